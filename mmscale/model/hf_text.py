"""Text towers of Hugging Face: `hf:NAME_OR_PATH`, the text part of a two-part model."""

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

from mmscale.config.schema import TextConfig
from mmscale.errors import ConfigError
from mmscale.model.freezing import chain
from mmscale.model.hf_models import (
    BRING,
    build_model,
    checkpoint_hf,
    class_for,
    model_folder,
    override,
    read_config,
    read_json,
)
from mmscale.model.hub import hub_call
from mmscale.model.inputs import TextInput, agreed_context
from mmscale.model.pooling import Pooling
from mmscale.model.sources import constructing
from mmscale.model.width import Tower, look

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
        output = self.trunk(input_ids=tokens, attention_mask=mask.long())
        states = output.last_hidden_state
        return output.pooler_output if self.pooling == "model" else self.pool(states, mask), states

    def checkpoint_blocks(self) -> bool:
        return checkpoint_hf(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return chain(self.trunk)


class HfTokenize:
    """Captions to ids with special tokens, cut to `context_length`; picklable."""

    def __init__(self, tokenizer: Any, context_length: int):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(captions), truncation=True, max_length=self.context_length)[
            "input_ids"
        ]


def build_hf_text(name: str, config: TextConfig) -> tuple[Tower, TextInput]:
    """`hf:NAME_OR_PATH` with its folder's or hub's weights, a file's, or random ones."""
    folder = model_folder(name, KEY)
    model_config = read_config(folder, KEY, "text_config")
    override(model_config, config.options, KEY, name)
    trunk = build_model(text_class(model_config, name), model_config, folder, config, KEY)
    with constructing(KEY, f"hf:{name}"):
        tower = HfTextTower(trunk, pooling_of(folder, model_config, config.pooling))
    return tower, _text_input(folder, trunk, config)


def text_class(config: PretrainedConfig, name: str) -> Any:
    """The encoder's class; of an encoder with a decoder, the encoder's own."""
    mapping = MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(config) not in mapping:
        mapping = MODEL_MAPPING
    return class_for(config, mapping, name, KEY)


def _text_input(folder: str, trunk: PreTrainedModel, config: TextConfig) -> TextInput:
    what = f"the tokenizer of {KEY}.name=hf:{folder}"
    read_json(folder, "tokenizer_config.json")
    with hub_call(what, f"{BRING} and its tokenizer", remote=not Path(folder).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    rows: Any = trunk.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer of hf:{folder} has {len(tokenizer)} tokens and the model embeds "
            f"{rows}; give the tokenizer that belongs to it, or model.text.options.vocab_size."
        )
    longest = min(tokenizer.model_max_length, max_positions(trunk))
    length = agreed_context(config.context_length, longest, f"hf:{folder}")
    # The mask hides padding, so that a tokenizer without a padding token may use any.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TextInput(HfTokenize(tokenizer, length), pad, length)


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
