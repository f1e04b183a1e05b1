"""Figures of any model, read from the model itself, which is built without its weights' memory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import MODEL_MAPPING

from mmscale.config.model import VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.hf_models import class_for, model_folder, read_config, without_pooler
from mmscale.model.hf_text import (
    HfTextTower,
    max_positions,
    pooling_of,
    require_tokenizer,
    text_class,
)
from mmscale.model.hf_vision import HfVisionTower, image_input
from mmscale.model.inputs import DEFAULT_CONTEXT, ImageInput
from mmscale.model.openclip_towers import (
    OpenClipText,
    OpenClipVision,
    openclip_config,
    openclip_pixels,
)
from mmscale.model.outline import config_of, without_weights, write_description
from mmscale.model.presets import OPENCLIP
from mmscale.model.registry import TowerEntry, curated
from mmscale.model.sources import constructing
from mmscale.model.timm_vision import build_timm_vision
from mmscale.model.tower import Tower, without_values

POOLINGS = {"token": "cls", "tok": "cls", "avg": "mean", "argmax": "eos", "": "none"}
# Settings of Hugging Face's image encoders that its text encoders lack.
IMAGE_KEYS = ("image_size", "patch_size", "num_channels", "depths")


def measure(name: str) -> list[TowerEntry]:
    """Read a model's figures; of a Hugging Face model of two parts, those of both.

    Args:
        name: `timm:NAME`, `hf:NAME_OR_PATH` or `openclip:NAME`; of a curated name on the hub, the
            configuration is at hand, of others it is fetched.

    Raises:
        ConfigError: There is no such model, or its configuration cannot be had.
    """
    source, _, rest = name.partition(":")
    if source == "timm":
        return [_timm(name, rest)]
    if source == "openclip":
        return [_pair(name)]
    known = {**curated()["vision"], **curated()["text"]}.get(name)
    if known is None:
        folder = model_folder(rest, "model.text")
        return [_with_fault(entry, folder) for entry in _hugging_face(name, folder, None)]
    with tempfile.TemporaryDirectory() as folder:
        write_description(known, Path(folder))
        return _hugging_face(name, folder, known["licence"])


def _timm(name: str, rest: str) -> TowerEntry:
    def build() -> tuple[Tower, ImageInput]:
        return build_timm_vision(rest, VisionConfig(name=name, weights="random"), None)

    tower, pixels = without_weights(build)
    trunk: Any = tower.trunk
    licence = curated()["vision"].get(name) is not None and trunk.pretrained_cfg.get("license")
    return _vision(name, tower, pixels, _timm_pooling(trunk), licence or None)


def _timm_pooling(trunk: Any) -> str:
    for holder in (trunk, getattr(trunk, "head", None)):
        pool = getattr(holder, "global_pool", None)
        kind = getattr(pool, "pool_type", pool)
        if isinstance(kind, str) and kind:
            return POOLINGS.get(kind, kind)
    return "mean"


def _hugging_face(name: str, folder: str, licence: str | None) -> list[TowerEntry]:
    whole = read_config(folder, "model.text")
    vision = getattr(whole, "vision_config", whole)
    text = getattr(whole, "text_config", whole)
    found = []
    if any(hasattr(vision, key) for key in IMAGE_KEYS):
        found.append(_hf_vision(name, vision, folder, licence))
    if text is not vision or not found:
        found.append(_hf_text(name, text, folder, licence))
    return found


def _with_fault(entry: TowerEntry, folder: str) -> TowerEntry:
    """A text tower in a folder, with what is wrong with its tokenizer."""
    if entry.part != "text" or not Path(folder).is_dir():
        return entry
    try:
        require_tokenizer(folder, entry.vocabulary)
    except ConfigError as error:
        return replace(entry, fault=str(error))
    return entry


def _hf_vision(name: str, config: Any, folder: str, licence: str | None) -> TowerEntry:
    settings = VisionConfig(name=name, weights="random")
    pixels = image_input(folder, settings, getattr(config, "image_size", None))
    kind = class_for(config, MODEL_MAPPING, name, "model.vision")

    def build() -> HfVisionTower:
        return HfVisionTower(kind(config, **without_pooler(kind)), pixels.image_size)

    with constructing("model.vision", name):
        tower = without_weights(build)
    return _vision(name, tower, pixels, tower.unpooled.kind, licence)


def _hf_text(name: str, config: Any, folder: str, licence: str | None) -> TowerEntry:
    kind, pooling = text_class(config, name), pooling_of(folder, config, "auto")

    def build() -> HfTextTower:
        return HfTextTower(kind(config, **without_pooler(kind)), pooling)

    with constructing("model.text", name):
        tower = without_weights(build)
    return _text(name, tower, pooling, max_positions(tower.trunk), licence)


def _pair(name: str) -> TowerEntry:
    rest = name.removeprefix(OPENCLIP)
    whole = openclip_config(rest, "mmscale models")
    quick = whole.get("quick_gelu", False)
    vision, text = CLIPVisionCfg(**whole["vision_cfg"]), CLIPTextCfg(**whole["text_cfg"])
    pixels = openclip_pixels(vision.image_size, _preprocessing(rest))

    def build_vision() -> Tower:
        trunk = _build_vision_tower(whole["embed_dim"], vision, quick)
        return OpenClipVision(trunk, pixels.image_size)

    def build_text() -> Tower:
        with _local_text(text) as local:
            trunk = _build_text_tower(whole["embed_dim"], local, quick)
        return OpenClipText(trunk, 0)

    images, captions = without_weights(build_vision), without_weights(build_text)
    image = _vision(name, images, pixels, _openclip_pooling(images.trunk), None)
    caption = _text(name, captions, _openclip_pooling(captions.trunk), text.context_length, None)
    parts = {
        part: {
            key: getattr(entry, key)
            for key in ("parameters", "flops", "sequence_width", "pooling", "blocks")
        }
        for part, entry in {"vision": image, "text": caption}.items()
    }
    return TowerEntry(
        name=name,
        part="pair",
        width=image.width,
        pooling=f"{image.pooling} + {caption.pooling}",
        parameters=image.parameters + caption.parameters,
        flops=image.flops + caption.flops,
        flops_tokens=caption.flops_tokens,
        image_size=image.image_size,
        mean=image.mean,
        std=image.std,
        interpolation=image.interpolation,
        image_tokens=image.image_tokens,
        context_length=caption.context_length,
        vocabulary=caption.vocabulary,
        parts=parts,
    )


def _preprocessing(name: str) -> dict[str, Any]:
    """That of the weights that OpenCLIP offers, if most of its tags say something else."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    facts = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    kinds = [(f.get("mean"), f.get("std"), f.get("interpolation")) for f in facts]
    if not kinds:
        return {}
    mean, std, interpolation = max(kinds, key=kinds.count)
    return {"mean": mean, "std": std, "interpolation": interpolation}


def _openclip_pooling(trunk: Any) -> str:
    if getattr(trunk, "attn_pool", None) is not None or hasattr(trunk, "attnpool"):
        return "map"
    if hasattr(trunk, "trunk"):
        return _timm_pooling(trunk.trunk)
    if hasattr(trunk, "pooler"):
        return "mean" if "Mean" in type(trunk.pooler).__name__ else "cls"
    if getattr(trunk, "cls_emb", None) is not None:
        return "last"
    return POOLINGS.get(trunk.pool_type, trunk.pool_type)


@contextmanager
def _local_text(text: CLIPTextCfg) -> Iterator[CLIPTextCfg]:
    """A text tower of Hugging Face's from a folder with its committed configuration."""
    random = replace(text, hf_model_pretrained=False)
    values = curated()["openclip_text"].get(text.hf_model_name)
    if values is None:
        yield random
        return
    with tempfile.TemporaryDirectory() as folder:
        config_of(values).save_pretrained(folder)
        yield replace(random, hf_model_name=folder)


def _flops(tower: Tower, *inputs: Tensor) -> int:
    device = next(tower.parameters()).device
    tower.eval()
    with without_values(tower), FlopCounterMode(display=False) as counter:
        tower(
            *(
                torch.empty_like(value, device=device)
                if value.is_floating_point()
                else torch.ones_like(value, device=device)
                for value in inputs
            )
        )
    return counter.get_total_flops()


def _parameters(tower: Tower) -> int:
    return sum(parameter.numel() for parameter in tower.parameters())


def _vision(
    name: str, tower: Tower, pixels: ImageInput, pooling: str, licence: str | None
) -> TowerEntry:
    row = torch.zeros(1, 3, pixels.image_size, pixels.image_size)
    device = next(tower.parameters()).device
    with without_values(tower), torch.no_grad():
        image_tokens = tower.eval().forward_sequence(row.to(device))[1].shape[1]
    return TowerEntry(
        name=name,
        part="vision",
        width=tower.width,
        sequence_width=tower.sequence_width,
        pooling=pooling,
        blocks=len(tower.block_parameters()) - 1,
        parameters=_parameters(tower),
        flops=_flops(tower, row),
        licence=licence,
        image_size=pixels.image_size,
        mean=pixels.mean,
        std=pixels.std,
        interpolation=pixels.interpolation,
        image_tokens=image_tokens,
    )


def _text(name: str, tower: Tower, pooling: str, longest: int, licence: str | None) -> TowerEntry:
    tokens = min(longest, DEFAULT_CONTEXT)
    row = torch.ones(1, tokens, dtype=torch.int64)
    trunk: Any = tower.trunk
    if hasattr(trunk, "get_input_embeddings"):
        vocabulary = trunk.get_input_embeddings().num_embeddings
    else:
        vocabulary = trunk.vocab_size
    return TowerEntry(
        name=name,
        part="text",
        width=tower.width,
        sequence_width=tower.sequence_width,
        pooling=pooling,
        blocks=len(tower.block_parameters()) - 1,
        parameters=_parameters(tower),
        flops=_flops(tower, row, row.bool()),
        flops_tokens=tokens,
        licence=licence,
        context_length=longest,
        vocabulary=vocabulary,
    )
