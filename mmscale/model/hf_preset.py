"""`model.preset=hf:NAME_OR_PATH`: a whole model of Hugging Face's, its embeddings exactly its own.

Both towers run the library's own `get_image_features` and `get_text_features`, with the model's
pooling and projections; no head follows. Scale and, for SigLIP, bias are the model's.
"""

from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoImageProcessor, PretrainedConfig, PreTrainedModel

from mmscale.config.model import ModelConfig
from mmscale.errors import ConfigError
from mmscale.model.freezing import apply_settings, chain
from mmscale.model.hf_models import (
    BRING,
    PRESET,
    WHOLE_ROWS,
    build_hf_model,
    checkpoint_hf,
    class_for,
    read_json,
    read_whole,
    width_of,
)
from mmscale.model.hf_text import hf_text_input, max_positions, ready_mask
from mmscale.model.hf_vision import resize_positions
from mmscale.model.hub import hub_call
from mmscale.model.inputs import ImageInput, TextInput, triple
from mmscale.model.presets import HF, require_taken_as_it_is
from mmscale.model.scale import LogitScale, take_scale
from mmscale.model.stretched import stretch_hf
from mmscale.model.tower import Tower, look
from mmscale.model.two_tower import TwoTower

# Causal and pooled at the end token, which padding behind it cannot reach.
AT_END = ("clip",)
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class HfWholeVision(Tower):
    """The image half of a whole model, with its projection."""

    def __init__(self, trunk: PreTrainedModel, image_size: int):
        super().__init__(trunk)
        look(self, torch.zeros(1, 3, image_size, image_size))

    def forward_sequence(
        self, pixels: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b s e"]]:
        trunk: Any = self.trunk
        output = trunk.get_image_features(pixel_values=pixels)
        return output.pooler_output, output.last_hidden_state

    def checkpoint_blocks(self) -> bool:
        return checkpoint_hf(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return chain(self.trunk, ("visual_projection",))


class HfWholeText(Tower):
    """The text half of a whole model, with its projection; takes rows trimmed to the longest."""

    def __init__(self, trunk: PreTrainedModel, pad_token: int, context: int):
        """Wrap a half.

        Args:
            trunk: As `halves` gives it.
            pad_token: That fills rows of a model that reads whole ones.
            context: Tokens of a whole row.
        """
        super().__init__(trunk)
        self.pad_token = pad_token
        self.whole_rows = context if trunk.config.model_type in WHOLE_ROWS else 0
        tokens = torch.ones(1, 4, dtype=torch.int64)
        look(self, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def forward_sequence(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b t e"]]:
        trunk: Any = self.trunk
        length = tokens.shape[1]
        hidden = None
        if self.whole_rows:
            tokens = F.pad(tokens, (0, max(self.whole_rows - length, 0)), value=self.pad_token)
        elif trunk.config.model_type not in AT_END:
            on_host = mask.device.type in ("cpu", "meta")
            hidden = mask.long() if on_host else ready_mask(trunk.text_model, mask)
        output = trunk.get_text_features(input_ids=tokens, attention_mask=hidden)
        return output.pooler_output, output.last_hidden_state[:, :length]

    def checkpoint_blocks(self) -> bool:
        return checkpoint_hf(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return chain(self.trunk, ("text_projection",))


def build_whole_hf(
    config: ModelConfig, image_size: int | None, fill: bool = True
) -> tuple[TwoTower, ImageInput, TextInput]:
    """The model that a filled `model.preset=hf:NAME_OR_PATH` asks for.

    Args:
        config: `model`.
        image_size: `data.image_size`, pixels; None takes the size of the model's preprocessing.
        fill: With its weights; without, with random ones to be replaced.

    Raises:
        ConfigError: A setting contradicts the model, or its files cannot be had.
        CheckpointError: A weights file does not fit.
    """
    name = str(config.preset).removeprefix(HF)
    folder, whole = read_whole(name)
    require_taken_as_it_is(config, f"hf:{name}", width_of(whole), pooling=False)
    pixels = whole_pixels(folder, image_size)
    weights = config.weights if fill else "random"
    model = _create(whole, folder, config.model_copy(update={"weights": weights}), pixels)
    asked = config.text.context_length
    length = stretch_hf(model.text_model, asked, max_positions(model.text_model))
    at_end = whole.model_type in AT_END
    tokens = hf_text_input(folder, model.text_model, config.text, length, at_end)
    model.config.text_config, model.config.vision_config = (
        model.text_model.config,
        model.vision_model.config,
    )
    scale = LogitScale(config.logit_scale, of_whole=True)
    if weights != "random":
        bias = getattr(model, "logit_bias", None)
        take_scale(scale, model.logit_scale, bias, f"model.weights={weights} of hf:{name}")
    vision = HfWholeVision(_half(model, ("vision_model", "visual_projection")), pixels.image_size)
    half = _half(model, ("text_model", "text_projection"))
    text = HfWholeText(half, tokens.pad_token, length)
    apply_settings(vision, config.vision, "model.vision")
    apply_settings(text, config.text, "model.text")
    frozen = frozenset(part for part in ("vision", "text") if getattr(config, part).frozen is True)
    heads = {"image": nn.Identity(), "text": nn.Identity()}
    two_tower = TwoTower(vision, text, heads, scale, frozen)
    return two_tower, pixels.override(config.vision), tokens


def _create(whole: PretrainedConfig, folder: str, config: ModelConfig, pixels: ImageInput) -> Any:
    model_class = class_for(whole, MODEL_MAPPING, folder, PRESET)
    size, vision = pixels.image_size, whole.vision_config
    if config.weights == "random" and hasattr(vision, "image_size"):
        vision.image_size = size
    model: Any = build_hf_model(model_class, whole, folder, config, PRESET)
    if getattr(model.vision_model.config, "image_size", size) != size:
        resize_positions(model.vision_model, size, f"hf:{folder}")
    return model


def _half(model: PreTrainedModel, parts: tuple[str, ...]) -> PreTrainedModel:
    """A model of the same class that holds these parts only and shares their parameters."""
    half = copy(model)
    vars(half)["_modules"] = {n: m for n, m in model.named_children() if n in parts}
    vars(half)["_parameters"] = {}
    return half


def whole_pixels(folder: str, image_size: int | None) -> ImageInput:
    """The preprocessing that lies beside a model, at its own size or `data.image_size`.

    Raises:
        ConfigError: There is none, or it does what is not offered.
    """
    for file in ("preprocessor_config.json", "processor_config.json"):
        read_json(folder, file)
    what = f"the preprocessing of {PRESET}=hf:{folder}"
    with hub_call(what, f"{BRING} and its preprocessor", remote=not Path(folder).is_dir()):
        processor: Any = AutoImageProcessor.from_pretrained(folder)
    size, crop = dict(processor.size), dict(processor.crop_size or {})
    shortest = size.get("shortest_edge")
    sides = {size.get("height"), size.get("width")} if shortest is None else {shortest}
    if processor.do_center_crop:
        sides |= {crop.get("height"), crop.get("width")}
    steps = processor.do_resize and processor.do_rescale and processor.do_normalize
    cuts = shortest is None or processor.do_center_crop
    interpolation = _INTERPOLATIONS.get(int(processor.resample))
    if len(sides) != 1 or None in sides or not steps or not cuts or interpolation is None:
        raise ConfigError(
            f"{what} (size={size}, crop_size={crop}, resample={processor.resample}) is none that "
            f"is offered: a bilinear or bicubic resize of the shortest side and a crop of that "
            f"size, or of both sides, then a normalisation; change its preprocessor_config.json."
        )
    return ImageInput(
        image_size=image_size or int(sides.pop() or 0),
        mean=triple(processor.image_mean),
        std=triple(processor.image_std),
        interpolation=interpolation,
        resize="squash" if shortest is None else "shortest",
    )
