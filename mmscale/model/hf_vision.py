"""Image towers of Hugging Face: `hf:NAME_OR_PATH`, the image part of a two-part model."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedModel

from mmscale.config.schema import VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.hf_models import (
    build_model,
    class_for,
    model_folder,
    override,
    read_config,
    read_json,
)
from mmscale.model.inputs import ImageInput, agreed_size, triple
from mmscale.model.sources import constructing
from mmscale.model.width import Tower, output_width

KEY = "model.vision"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BILINEAR = 2  # PIL's number for the resampling in preprocessor_config.json


class HfVisionTower(Tower):
    """A vision model that gives its pooled output where it has one, else its CLS token or the mean.

    A pooler that can be left out is left out: many checkpoints do not carry its weights.
    """

    def __init__(self, trunk: PreTrainedModel, image_size: int):
        super().__init__()
        self.trunk = trunk
        self.has_cls = any("cls_token" in name for name, _ in trunk.named_parameters())
        self.width = output_width(self, torch.zeros(1, 3, image_size, image_size))

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        output = self.trunk(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        states = output.last_hidden_state
        if states.ndim == 4:
            return states.mean((2, 3))
        return states[:, 0] if self.has_cls else states.mean(1)


def build_hf_vision(
    name: str, config: VisionConfig, image_size: int | None
) -> tuple[Tower, ImageInput]:
    """`hf:NAME_OR_PATH` with its folder's or hub's weights, a file's, or random ones."""
    folder = model_folder(name, KEY)
    model_config = read_config(folder, KEY, "vision_config")
    size = agreed_size(image_size, config.options, "image_size")
    override(model_config, config.options, KEY, name)
    if size and hasattr(model_config, "image_size"):
        model_config.image_size = size
    model_class = class_for(model_config, MODEL_MAPPING, name, KEY)
    trunk = build_model(model_class, model_config, folder, config, KEY)
    pixels = _image_input(folder, config, size or getattr(model_config, "image_size", None))
    with constructing(KEY, f"hf:{name} at {pixels.image_size} pixels"):
        return HfVisionTower(trunk, pixels.image_size), pixels


def _image_input(folder: str, config: VisionConfig, size: int | None) -> ImageInput:
    """Normalisation from preprocessor_config.json; ImageNet's where random weights have none."""
    facts = read_json(folder, "preprocessor_config.json")
    known = config.weights == "random" or (config.mean is not None and config.std is not None)
    if "image_mean" not in facts and not known:
        raise ConfigError(
            f"hf:{folder} does not say how its pixels are normalised, having no "
            f"preprocessor_config.json: set model.vision.mean and model.vision.std."
        )
    size = size or _size_of(facts)
    if size is None:
        raise ConfigError(f"hf:{folder} does not say its image size: set data.image_size.")
    return ImageInput(
        image_size=size,
        mean=triple(facts.get("image_mean", IMAGENET_MEAN)),
        std=triple(facts.get("image_std", IMAGENET_STD)),
        interpolation="bilinear" if facts.get("resample") == BILINEAR else "bicubic",
    )


def _size_of(facts: dict[str, Any]) -> int | None:
    size = facts.get("crop_size") or facts.get("size") or {}
    return size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
