"""Text towers of Hugging Face: `hf:NAME_OR_PATH`, the text part of a two-part model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from mmscale.config.model import TextConfig
from mmscale.errors import ConfigError
from mmscale.model.freezing import chain
from mmscale.model.hf_models import (
    BRING,
    build_hf_model,
    checkpoint_hf,
    class_for,
    file_of,
    left_out_line,
    model_folder,
    override,
    part_of,
    read_config,
    read_json,
)
from mmscale.model.hub import hub_call
from mmscale.model.inputs import TextInput, agreed_context
from mmscale.model.sources import constructing
from mmscale.model.stretched import stretch_hf
from mmscale.model.tower import Pooling, Tower, look

KEY = "model.text"
# Models trained for one pooled vector, which a mean over tokens would throw away.
POOLED = ("clip_text_model",)


class HfTextTower(Tower):
    """A text model and a pooling of its last states; padding never counts."""

    def __init__(self, trunk: PreTrainedModel, pooling: str):
        """Wrap a model.

        Args:
            trunk: Encoder without a pooler.
            pooling: As `Pooling`'s, or `model` for the model's own pooled output.
        """
        super().__init__(trunk)
        self.pooling = pooling
        self.pool = Pooling(pooling if pooling in ("cls", "eos") else "mean", 0)
        tokens = torch.ones(1, 4, dtype=torch.int64)
        row = tokens, torch.ones_like(tokens, dtype=torch.bool)
        look(self, *row)
        if pooling == "map":
            self.pool = Pooling(pooling, self.sequence_width)
            look(self, *row)

    def forward_sequence(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b t e"]]:
        hidden = mask.long() if mask.device.type in ("cpu", "meta") else self.ready(mask)
        output = self.trunk(input_ids=tokens, attention_mask=hidden)
        states = output.last_hidden_state
        return output.pooler_output if self.pooling == "model" else self.pool(states, mask), states

    def ready(self, mask: Bool[Tensor, "b t"]) -> Tensor | None:
        """The mask in a form whose values the model does not look at: the host would wait.

        None where a causal model pools at a caption's end, which padding behind it cannot reach.
        """
        trunk: Any = self.trunk
        if self.pooling == "model" and trunk.config.model_type in POOLED:
            return None
        return ready_mask(trunk, mask)

    def checkpoint_blocks(self) -> bool:
        return checkpoint_hf(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return chain(self.trunk)


def ready_mask(trunk: Any, mask: Bool[Tensor, "b t"]) -> Tensor:
    """Hide padding from a model by a mask that an accelerator need not look at."""
    library = vars(sys.modules[type(trunk).__module__])
    is_made = "create_bidirectional_mask" in library and not trunk.config.is_decoder
    if is_made and trunk.config._attn_implementation == "sdpa":
        return mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return mask.long()


def build_hf_text(name: str, config: TextConfig) -> tuple[Tower, TextInput]:
    """`hf:NAME_OR_PATH` with its folder's or hub's weights, a file's, or random ones."""
    folder = model_folder(name, KEY)
    whole = read_config(folder, KEY)
    model_config = part_of(whole, "text_config")
    override(model_config, config.options, KEY, name)
    trunk = build_hf_model(text_class(model_config, name), model_config, folder, config, KEY)
    longest = stretch_hf(trunk, config.context_length, max_positions(trunk))
    with constructing(KEY, f"hf:{name}"):
        pooling = pooling_of(folder, model_config, config.pooling)
        tower = HfTextTower(trunk, pooling)
    tower.left_out = left_out_line(whole, "text_config", KEY, name)
    at_end = pooling == "model" and model_config.model_type in POOLED
    return tower, hf_text_input(folder, trunk, config, longest, at_end)


def text_class(config: PretrainedConfig, name: str) -> Any:
    """The encoder's class; of an encoder with a decoder, the encoder's own."""
    mapping = MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(config) not in mapping:
        mapping = MODEL_MAPPING
    return class_for(config, mapping, name, KEY)


def max_positions(trunk: PreTrainedModel) -> int:
    """Tokens that the position table has rows for; RoBERTa's spends its first rows on padding."""
    longest: int = getattr(trunk.config, "max_position_embeddings", None) or 1 << 30
    for name, module in trunk.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            return longest - padding - 1
    return longest


def pooling_of(folder: str, model_config: PretrainedConfig, asked: str) -> str:
    """`auto`: what sentence-transformers wrote beside the model, else its own, else `mean`."""
    if asked != "auto":
        return asked
    facts = read_json(folder, "1_Pooling/config.json")
    if not facts:
        return "model" if model_config.model_type in POOLED else "mean"
    _require_nothing_above(folder)
    modes = {mode for mode in ("cls", "mean") if facts.get("pooling_mode") == mode}
    if facts.get("pooling_mode_cls_token"):
        modes.add("cls")
    if facts.get("pooling_mode_lasttoken"):
        modes.add("eos")
    modes |= {
        word.removesuffix("_tokens")
        for word in ("mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
        if facts.get(f"pooling_mode_{word}")
    }
    if len(modes) == 1 and modes <= {"cls", "mean", "eos"}:
        return modes.pop()
    raise ConfigError(
        f"hf:{folder} was made for a pooling that is not offered ({', '.join(sorted(modes))}): set "
        f"model.text.pooling to cls, mean, eos or map."
    )


def _require_nothing_above(folder: str) -> None:
    """Refuse a sentence encoder whose projection above the pooling would be left out."""
    for module in read_json(folder, "modules.json").values():
        kind = str(dict(module).get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize", "Dropout"):
            raise ConfigError(
                f"hf:{folder} has a {kind} above its pooling (modules.json), which a tower leaves "
                f"out: set model.text.pooling to cls, mean, eos or map to take it without."
            )


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
    # A stretched table takes more than what the tokenizer was saved for.
    is_stretched = config.context_length == longest
    most = longest if is_stretched else min(tokenizer.model_max_length, longest)
    length = agreed_context(config.context_length, most, f"hf:{folder}")
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
