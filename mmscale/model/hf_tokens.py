"""Tokenizers of Hugging Face's models, and whether they fit the model that they feed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from mmscale.config.model import TextConfig
from mmscale.errors import ConfigError
from mmscale.model.hf_models import BRING, file_of, read_json
from mmscale.model.hub import hub_call
from mmscale.model.inputs import TextInput, agreed_context

# A tokenizer gives at least this share of the tokens that its model embeds; tables are padded to
# round numbers, by less than a tenth.
LEAST_SHARE = 0.25
# What holds a vocabulary, whatever its class calls its file.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "tekken.json",
)


class HfTokenize:
    """Captions to ids with special tokens, cut to `context_length`; picklable."""

    def __init__(self, tokenizer: Any, context_length: int):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(captions), truncation=True, max_length=self.context_length)[
            "input_ids"
        ]


def hf_text_input(
    folder: str, trunk: PreTrainedModel, config: TextConfig, longest: int, pools_at_end: bool
) -> TextInput:
    """The tokenizer of a text tower.

    Args:
        folder: The model's, or its name on the hub.
        trunk: The model.
        config: `model.text`.
        longest: Tokens that the model takes.
        pools_at_end: The model's feature is read where its end token stands.

    Raises:
        ConfigError: There is no tokenizer, or not the one that the model was trained with.
    """
    embeddings: Any = trunk.get_input_embeddings()
    tokenizer = require_tokenizer(folder, embeddings.num_embeddings)
    length = agreed_context(
        config.context_length, min(tokenizer.model_max_length, longest), f"hf:{folder}"
    )
    tokenize = HfTokenize(tokenizer, length)
    if pools_at_end:
        _require_end(folder, tokenize, trunk)
    # The mask hides padding, so that a tokenizer without a padding token may use any.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TextInput(tokenize, pad, length, tokenizer.unk_token_id)


def require_tokenizer(folder: str, rows: int | None) -> Any:
    """A model's tokenizer, which is whole and fits its table of `rows` embeddings.

    Raises:
        ConfigError: There is none, or that of another model.
    """
    what = f"the tokenizer of model.text.name=hf:{folder}"
    read_json(folder, "tokenizer_config.json")
    with hub_call(what, f"{BRING} and its tokenizer", remote=not Path(folder).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        require_vocabulary(folder, tokenizer)
    if rows is not None:
        require_size(folder, tokenizer, rows)
    return tokenizer


def require_vocabulary(folder: str, tokenizer: Any) -> None:
    """Refuse a model that was copied without its tokenizer: an empty one would be made up."""
    files: dict[str, str] = getattr(tokenizer, "vocab_files_names", None) or {}
    if not files or _has(folder, "tokenizer.json"):
        return  # made of bytes, or whole in one file
    needed = [files[key] for key in ("vocab_file", "merges_file") if key in files]
    named = [file for file in (*files.values(), *VOCABULARIES) if _has(folder, file)]
    missing = [file for file in needed if not _has(folder, file)]
    if missing and (not named or "merges_file" in files):
        raise ConfigError(
            f"model.text.name=hf:{folder} lacks the files of its tokenizer "
            f"({' and '.join(missing) or ', '.join(VOCABULARIES[:3])}, or tokenizer.json), without "
            f"which every word is unknown: copy them beside config.json."
        )


def _has(folder: str, file: str) -> bool:
    return file_of(folder, file) is not None


def require_size(folder: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer whose ids the model's table of `rows` embeddings does not have, or few."""
    if LEAST_SHARE * rows <= len(tokenizer) <= rows:
        return
    raise ConfigError(
        f"the tokenizer of hf:{folder} has {len(tokenizer)} tokens and the model embeds {rows}; "
        f"give the tokenizer that belongs to it, or model.text.options.vocab_size."
    )


def _require_end(folder: str, tokenize: HfTokenize, trunk: PreTrainedModel) -> None:
    """Refuse a tokenizer that does not end captions with the token at which the model pools."""
    end: Any = getattr(trunk.config, "eos_token_id", None)
    ids = tokenize(["a"])[0]
    # Configurations of the first CLIPs say 2 and mean the largest id.
    found = max(ids) if end == 2 else end
    if found not in ids or ids.index(found) != len(ids) - 1:
        raise ConfigError(
            f"hf:{folder} pools at its end token ({found}), and its tokenizer ends a caption with "
            f"{ids[-1]}; give the tokenizer that belongs to it, or set model.text.pooling."
        )
