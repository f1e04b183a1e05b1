"""Models that somebody else stored: their files are data, and no code of theirs ever runs.

Hugging Face's libraries run Python that a model's folder or page brings where a caller or one of
the model's own files says `trust_remote_code`, ask for leave on the terminal where nobody does,
and load native code where a configuration names a kernel of the hub as its attention. The lock
forbids all of it for the whole process, whoever calls; the checks say in a sentence what a file
asked for.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from transformers import dynamic_module_utils
from transformers.integrations import hub_kernels

from mmscale.errors import ConfigError

# Implementations that transformers itself brings, or an installed package.
IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "batched_mm",
    "grouped_mm",
)
_IMPLEMENTATION_KEYS = ("attn_implementation", "experts_implementation")
# Words of OpenCLIP's `tokenizer_kwargs` that change text, with what they may be.
TOKENIZER_WORDS: Mapping[str, Callable[[Any], bool]] = {
    "clean": lambda value: value in ("canonicalize", "lower", "whitespace"),
    "strip_sep_token": lambda value: isinstance(value, bool),
    "language": lambda value: value is None or isinstance(value, str),
    "additional_special_tokens": lambda value: (
        isinstance(value, list) and all(isinstance(word, str) for word in value)
    ),
    # The fourth, `syntax`, downloads a tagger and unpickles it.
    "reduction_mask": lambda value: value in ("", "simple", "random", "shuffle"),
}


def lock_libraries() -> None:
    """Keep transformers from running what a model brings, in this process, whoever calls it."""
    # A negative answer to its question, before it is asked.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    # The functions that fetch and run a module are looked up by these names at each call.
    for name in ("_raise_timeout_error", "get_cached_module_file", "get_class_in_module"):
        setattr(dynamic_module_utils, name, _refuse_code)
    for name in ("get_kernel", "get_kernel_hub"):
        setattr(hub_kernels, name, _refuse_kernel)
    # torch.load reads weights only, also where a library asks for more.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def _refuse_code(*args: Any, **words: Any) -> NoReturn:
    named = next((str(arg) for arg in args if isinstance(arg, str | os.PathLike)), "")
    brings = f" ({named})" if named else ""
    raise ConfigError(
        f"a model asks for Python code that its own folder or page brings{brings}, which mmscale "
        "never runs; give a model of a type that transformers knows."
    )


def _refuse_kernel(kernel: str = "", *args: Any, **words: Any) -> NoReturn:
    raise ConfigError(
        f"a model asks for the kernel {kernel} from the hub, which is native code that mmscale "
        "never loads; set its attn_implementation to sdpa or eager."
    )


def require_harmless(settings: Any, origin: str) -> None:
    """Refuse settings of a model or tokenizer that ask for more than data.

    Args:
        settings: What a JSON file or a configuration holds, nested as it may be.
        origin: Where they stand, for the message.

    Raises:
        ConfigError: Names the setting and its value.
    """
    for key, value in _settings(settings):
        if key == "trust_remote_code" and value:
            _refuse(origin, key, value, "would run Python code that the model brings", "remove it")
        if key == "quantization_config" and value:
            _refuse(
                origin,
                key,
                "...",
                "is for weights in a format that cannot be trained",
                "give the model in full precision",
            )
        if key == "backbone" and isinstance(value, str):
            _refuse(origin, key, value, "would open another model", "give that model itself")
        if key.removeprefix("_").removesuffix("_internal") in _IMPLEMENTATION_KEYS:
            for name in _leaves(value):
                if name not in IMPLEMENTATIONS:
                    rule = "is none of transformers' own, so it would be loaded from elsewhere"
                    _refuse(origin, key, name, rule, "set it to sdpa or eager, or remove it")


def require_harmless_tokenizer(words: Any, origin: str) -> None:
    """Refuse `tokenizer_kwargs` of an OpenCLIP configuration that do more than clean text.

    Raises:
        ConfigError: Names the word and its value.
    """
    if words is not None and not isinstance(words, Mapping):
        _refuse(origin, "tokenizer_kwargs", words, "is no mapping", "remove it")
    for word, value in (words or {}).items():
        if word not in TOKENIZER_WORDS or not TOKENIZER_WORDS[word](value):
            rule = f"is none of the words that may be set there ({', '.join(TOKENIZER_WORDS)})"
            _refuse(origin, f"tokenizer_kwargs.{word}", value, rule, "remove it")


def _refuse(origin: str, key: str, value: Any, rule: str, repair: str) -> NoReturn:
    raise ConfigError(f"{origin}: {key}={str(value)[:120]} {rule}; {repair}.")


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key), value
            yield from _settings(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _settings(value)


def _leaves(value: Any) -> Iterator[Any]:
    """An implementation, or those of each part of a model; those that are not set left out."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif value not in (None, ""):
        yield value
