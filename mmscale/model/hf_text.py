"""Text towers of Hugging Face: `hf:NAME_OR_PATH`, the text part of a two-part model."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from mmscale.config.model import TextConfig
from mmscale.errors import ConfigError
from mmscale.model.freezing import chain
from mmscale.model.hf_models import (
    build_model,
    checkpoint_hf,
    class_for,
    left_out_line,
    model_folder,
    override,
    part_of,
    read_config,
    read_json,
)
from mmscale.model.hf_tokens import hf_text_input
from mmscale.model.inputs import TextInput
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


def build_hf_text(name: str, config: TextConfig) -> tuple[Tower, TextInput]:
    """`hf:NAME_OR_PATH` with its folder's or hub's weights, a file's, or random ones."""
    folder = model_folder(name, KEY)
    whole = read_config(folder, KEY)
    model_config = part_of(whole, "text_config")
    override(model_config, config.options, KEY, name)
    trunk = build_model(text_class(model_config, name), model_config, folder, config, KEY)
    with constructing(KEY, f"hf:{name}"):
        pooling = pooling_of(folder, model_config, config.pooling)
        tower = HfTextTower(trunk, pooling)
    tower.left_out = left_out_line(whole, "text_config", KEY, name)
    at_end = pooling == "model" and model_config.model_type in POOLED
    return tower, hf_text_input(folder, trunk, config, max_positions(trunk), at_end)


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
