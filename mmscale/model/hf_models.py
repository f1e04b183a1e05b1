"""What image and text towers of Hugging Face share: config, class, weights; never remote code."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from mmscale.config.model import ModelConfig, TowerConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.foreign import require_harmless
from mmscale.model.hub import hub_call
from mmscale.model.sources import check_options, constructing
from mmscale.model.weights import UNREADABLE, first_line, load_strictly, read_weights, refuse

BRING = "point it at a folder that holds the model (hf:/path/to/folder)"
PRESET = "model.preset"
# Types of which a whole model is taken.
WHOLE = ("clip", "siglip", "chinese_clip", "altclip", "vision-text-dual-encoder")
# Trained on rows that are padded to the whole context, without a mask; pooled at the last place.
WHOLE_ROWS = ("siglip",)
# Tensors of older checkpoints that towers compute themselves, and task heads on top of the tower.
SPARE = ("pooler.", "embeddings.position_ids", "cls.", "lm_head.", "classifier.")


def model_folder(name: str, key: str) -> str:
    """A local folder as its path, anything else as a name on the hub.

    Raises:
        ConfigError: The name is a path and nothing is there.
    """
    path = Path(name)
    if path.is_dir():
        return str(path)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{named(name, key)} is no folder: give one that holds config.json and the weights."
        )
    return name


def named(name: str, key: str) -> str:
    """Setting and value that ask for a model, as messages say it."""
    return f"{key}{'' if key == PRESET else '.name'}=hf:{name}"


def read_config(name: str, key: str) -> PretrainedConfig:
    """The model's own config, of a two-part model (CLIP) that of the whole.

    Args:
        name: Folder, or name on the hub.
        key: `model.vision` or `model.text`.
    """
    if read_json(name, "adapter_config.json"):
        raise ConfigError(
            f"{named(name, key)} holds an adapter (adapter_config.json), which names the model "
            f"below it: merge the adapter into that model and give the result."
        )
    read_json(name, "config.json")
    with hub_call(named(name, key), BRING, remote=not Path(name).is_dir()):
        return AutoConfig.from_pretrained(name)


def read_whole(name: str) -> tuple[str, PretrainedConfig]:
    """Folder or hub name of a whole model, and its configuration.

    Raises:
        ConfigError: There is none, or it is no dual encoder that can be taken whole.
    """
    folder = model_folder(name, PRESET)
    config = read_config(folder, PRESET)
    if config.model_type not in WHOLE:
        raise ConfigError(
            f"{PRESET}=hf:{name} is a {config.model_type} model, which cannot be taken whole "
            f"({', '.join(WHOLE)} can): give such a model, or name towers "
            f"(model.vision.name, model.text.name)."
        )
    return folder, config


def width_of(config: PretrainedConfig) -> int:
    """Width of a whole model's embeddings."""
    if config.model_type in WHOLE_ROWS:
        return int(config.vision_config.hidden_size)
    return int(config.projection_dim)


def part_of(whole: PretrainedConfig, part: str) -> PretrainedConfig:
    """The `vision_config` or `text_config` of a two-part model; any other model as it is."""
    return getattr(whole, part, None) or whole


def left_out_line(whole: PretrainedConfig, part: str, key: str, name: str) -> str | None:
    """What to tell of a half whose projection into the shared space is no part of a tower."""
    if part_of(whole, part) is whole or not getattr(whole, "projection_dim", None):
        return None
    return (
        f"warning: {key}.name=hf:{name} is one half of a {whole.model_type} model: its projection "
        f"of {whole.projection_dim} into the space shared with the other half is left out, and "
        f"model.head starts anew"
    )


def small_files(folder: str, is_text: bool) -> Iterator[tuple[str, bytes]]:
    """What a tower's folder holds besides weights and code, as far as building it needs that.

    Args:
        folder: The model's, or its name on the hub.
        is_text: With the tokenizer.
    """
    names = ["config.json", "preprocessor_config.json", "processor_config.json"]
    if is_text:
        names += ["1_Pooling/config.json", "modules.json", *_tokenizer_files(folder)]
    for name in dict.fromkeys(names):
        if (found := file_of(folder, name)) is not None:
            yield name, found.read_bytes()


def _tokenizer_files(folder: str) -> list[str]:
    what = f"the tokenizer of model.text.name=hf:{folder}"
    with hub_call(what, f"{BRING} and its tokenizer", remote=not Path(folder).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    own: dict[str, str] = getattr(tokenizer, "vocab_files_names", None) or {}
    return [
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
        *own.values(),
    ]


def file_of(folder: str, file: str) -> Path | None:
    """A file of a model's folder, or of its page on the hub; None where there is none."""
    with hub_call(f"{file} of hf:{folder}", BRING, remote=not Path(folder).is_dir()):
        found = cached_file(
            folder,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return Path(found) if found else None


def read_json(folder: str, file: str) -> dict[str, Any]:
    """A small file beside the model; empty where there is none, a list's entries by their place.

    Raises:
        ConfigError: It is no JSON object or list, or asks for more than data (`require_harmless`).
    """
    found = file_of(folder, file)
    with hub_call(f"{file} of hf:{folder}", BRING, remote=False):
        content = json.loads(found.read_text(encoding="utf-8")) if found else {}
        if isinstance(content, list):
            content = {str(place): entry for place, entry in enumerate(content)}
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        require_harmless(content, f"{file} of hf:{folder}")
    return content


def override(config: PretrainedConfig, options: Mapping[str, Any], key: str, name: str) -> None:
    """Set the user's options on the config; only those that it has."""
    known = [option for option in config.to_dict() if not option.startswith("_")]
    check_options(options, {*known, *config.attribute_map}, key, f"hf:{name}")
    require_harmless(options, f"{key}.options")
    for option, value in options.items():
        setattr(config, option, value)


def build_hf_model(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    name: str,
    tower: TowerConfig | ModelConfig,
    key: str,
) -> PreTrainedModel:
    """The tower in fp32 with the weights that `tower.weights` asks for.

    Raises:
        ConfigError: Options or weights cannot be had.
        CheckpointError: The weights leave a tensor of the tower unset.
    """
    extra = without_pooler(model_class)
    if tower.weights == "pretrained":
        return _pretrained(model_class, config, name, key, extra)
    with constructing(key, f"hf:{name}"):
        model = model_class(config, **extra)
    if tower.weights != "random":
        tensors = read_weights(tower.weights, f"{key}.weights")
        tensors = _without_prefix(tensors, model)
        load_strictly(model, tensors, f"{key}.weights={tower.weights}", spare=SPARE)
    return model


def without_pooler(model_class: type[PreTrainedModel]) -> dict[str, bool]:
    """Words that leave out an unused pooler, whose weights would get no gradient."""
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def checkpoint_hf(model: Any) -> bool:
    """Switch transformers' checkpointing on; False where the model has none."""
    if not model.supports_gradient_checkpointing:
        return False
    # Its name in earlier releases, deprecated in later ones.
    before = "gradient_checkpointing_enable"
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, before)
    enable({"use_reentrant": False})
    return True


def class_for(config: PretrainedConfig, mapping: Mapping[Any, Any], name: str, key: str) -> Any:
    """The model class that `mapping` has for this config."""
    if type(config) not in mapping:
        raise ConfigError(
            f"{named(name, key)} is a {config.model_type} model, which cannot serve as this "
            f"tower; choose an encoder."
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _pretrained(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    name: str,
    key: str,
    extra: Mapping[str, bool],
) -> PreTrainedModel:
    load: Callable[..., Any] = model_class.from_pretrained
    words = {"config": config, "dtype": torch.float32, "output_loading_info": True, **extra}
    bring = f"{BRING}, set {key}.weights to a file, or to random to train it from scratch"
    what = f"{named(name, key)} with pretrained weights"
    with hub_call(what, bring, remote=not Path(name).is_dir()), _quiet():
        try:
            model, report = load(name, ignore_mismatched_sizes=True, **words)
        except UNREADABLE as error:
            raise CheckpointError(
                f"the weights of hf:{name} cannot be read into a {model_class.__name__}: "
                f"{first_line(error)}; fetch them again, or save them as safetensors."
            ) from error
    missing = [f"{tensor} is missing" for tensor in sorted(report["missing_keys"])]
    misshapen = [f"{tensor} has another shape" for tensor, *_ in report["mismatched_keys"]]
    refuse([*missing, *misshapen], f"the pretrained weights of hf:{name}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' progress bar and load report: `refuse` says what matters in it."""
    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _without_prefix(tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Names as the bare tower has them; task models put `bert.` or the like in front."""
    prefix = f"{model.base_model_prefix}."
    own = any(name.startswith(prefix) for name in model.state_dict())
    return tensors if own else {n.removeprefix(prefix): tensor for n, tensor in tensors.items()}
