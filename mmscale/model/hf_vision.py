"""Image towers of Hugging Face: `hf:NAME_OR_PATH`, the image part of a two-part model."""

import re
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from mmscale.config.model import VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.freezing import chain
from mmscale.model.hf_models import (
    build_hf_model,
    checkpoint_hf,
    class_for,
    left_out_line,
    model_folder,
    override,
    part_of,
    read_config,
    read_json,
)
from mmscale.model.inputs import ImageInput, agreed_size, at_size, triple
from mmscale.model.sources import constructing
from mmscale.model.tower import Pooling, Tower, look

KEY = "model.vision"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CLS = re.compile(r"cls_token|class_embedding")
# Types whose position table is interpolated to another size of image.
RESIZED = (
    "clip_vision_model",
    "siglip_vision_model",
    "chinese_clip_vision_model",
    "altclip_vision_model",
    "vit",
)
BILINEAR = 2  # PIL's number for the resampling in preprocessor_config.json


class HfVisionTower(Tower):
    """A vision model that gives its pooled output where it has one, else its CLS token or the mean.

    A pooler that can be left out is left out: many checkpoints do not carry its weights.
    """

    def __init__(self, trunk: PreTrainedModel, image_size: int, pooling: str = "auto"):
        super().__init__(trunk)
        self.pooling: Pooling | None = None
        has_cls = any(_CLS.search(name) for name, _ in trunk.named_parameters())
        if pooling == "cls" and not has_cls:
            raise ConfigError(
                f"{KEY}.pooling=cls, but this tower has no CLS token; set it to auto, mean or map."
            )
        row = torch.zeros(1, 3, image_size, image_size)
        self.unpooled = Pooling("cls" if has_cls else "mean", 0)
        look(self, row)
        if pooling != "auto":
            prefix = has_cls + getattr(trunk.config, "num_register_tokens", 0)
            self.pooling = Pooling(pooling, self.sequence_width, prefix)
            look(self, row)

    def forward_sequence(
        self, pixels: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b s e"]]:
        output = self.trunk(pixel_values=pixels)
        states = output.last_hidden_state
        sequence = states if states.ndim == 3 else states.flatten(2).transpose(1, 2)
        if self.pooling is not None:
            return self.pooling(sequence), sequence
        pooled = getattr(output, "pooler_output", None)
        return self.unpooled(sequence) if pooled is None else pooled.flatten(1), sequence

    def checkpoint_blocks(self) -> bool:
        return checkpoint_hf(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return chain(self.trunk)


def build_hf_vision(
    name: str, config: VisionConfig, image_size: int | None
) -> tuple[Tower, ImageInput]:
    """`hf:NAME_OR_PATH` with its folder's or hub's weights, a file's, or random ones."""
    folder = model_folder(name, KEY)
    whole = read_config(folder, KEY)
    model_config = part_of(whole, "vision_config")
    size = agreed_size(image_size, config.options, "image_size")
    own = getattr(model_config, "image_size", None)
    override(model_config, config.options, KEY, name)
    is_resized = size != own and config.weights != "random" and model_config.model_type in RESIZED
    if size and hasattr(model_config, "image_size") and not is_resized:
        model_config.image_size = size
    model_class = class_for(model_config, MODEL_MAPPING, name, KEY)
    with at_size(size, own, f"hf:{name}"):
        trunk = build_hf_model(model_class, model_config, folder, config, KEY)
    if size and is_resized:
        resize_positions(trunk, size, f"hf:{name}")
    pixels = image_input(folder, config, size or getattr(model_config, "image_size", None))
    with constructing(KEY, f"hf:{name} at {pixels.image_size} pixels"):
        tower = HfVisionTower(trunk, pixels.image_size, config.pooling)
    tower.left_out = left_out_line(whole, "vision_config", KEY, name)
    return tower, pixels


def resize_positions(trunk: Any, size: int, owner: str) -> None:
    """Give a vision model that holds its weights a table of positions for images of `size` pixels.

    The learnt grid is interpolated as timm does it: bicubic, antialiased; leading tokens stay.

    Raises:
        ConfigError: It keeps positions in another way.
    """
    own, patch = trunk.config.image_size, getattr(trunk.config, "patch_size", None)
    embeddings: Any = getattr(trunk, "embeddings", None)
    table = getattr(embeddings, "position_embedding", None)
    as_parameter = getattr(embeddings, "position_embeddings", None)
    is_known = isinstance(table, nn.Embedding) or isinstance(as_parameter, nn.Parameter)
    if not is_known or not isinstance(patch, int) or not isinstance(own, int):
        raise ConfigError(
            f"data.image_size={size}: the weights of {owner} are for images of {own} pixels, and "
            f"have no table of positions that could be interpolated; set data.image_size={own}, or "
            f"leave it out."
        )
    rows: Any = as_parameter if table is None else table.weight[None]
    side, prefix = size // patch, rows.shape[1] - (own // patch) ** 2
    # In the order in memory of any other table, so that sums over it are those of one.
    rows = resample_abs_pos_embed(rows.detach(), [side, side], num_prefix_tokens=prefix).clone(
        memory_format=torch.contiguous_format
    )
    trunk.config.image_size = size
    if table is None:
        patches = embeddings.patch_embeddings
        embeddings.position_embeddings = nn.Parameter(rows)
        embeddings.image_size = patches.image_size = (size, size)
        patches.num_patches = side * side
        return
    table.weight, table.num_embeddings = nn.Parameter(rows[0]), rows.shape[1]
    embeddings.image_size, embeddings.num_patches = size, side * side
    embeddings.num_positions = rows.shape[1]
    places = torch.arange(rows.shape[1]).expand(1, -1)
    embeddings.register_buffer("position_ids", places, persistent=False)


def image_input(folder: str, config: VisionConfig, size: int | None) -> ImageInput:
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
        resize=_resize_of(facts),
    )


def _resize_of(facts: dict[str, Any]) -> str:
    """Both sides are resized where the file names both and cuts nothing out afterwards."""
    size = facts.get("size")
    if facts.get("do_center_crop"):
        return "shortest"
    if isinstance(size, int):
        # Written before sides had names: ViT's meant both.
        kind = facts.get("image_processor_type") or facts.get("feature_extractor_type") or ""
        return "squash" if str(kind).startswith("ViT") else "shortest"
    names_both = isinstance(size, dict) and {"height", "width"} <= size.keys()
    return "squash" if names_both else "shortest"


def _size_of(facts: dict[str, Any]) -> int | None:
    size = facts.get("crop_size") or facts.get("size") or {}
    return size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
