"""`model.preset=openclip:NAME`: a whole OpenCLIP model, its embeddings exactly its own.

Both towers keep OpenCLIP's projections and no head follows. Its weights come from `model.weights`:
`random`, one of OpenCLIP's tags, or a file.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from mmscale.config.schema import ModelConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.freezing import settle
from mmscale.model.hub import hub_call
from mmscale.model.inputs import ImageInput, TextInput
from mmscale.model.openclip_towers import (
    OpenClipText,
    OpenClipVision,
    is_on_hub,
    openclip_config,
    openclip_pixels,
    openclip_tokens,
    require_own_pooling,
)
from mmscale.model.presets import OPENCLIP
from mmscale.model.scale import LogitScale
from mmscale.model.two_tower import TwoTower
from mmscale.model.weights import read_weights


def build_whole_openclip(
    config: ModelConfig, image_size: int | None
) -> tuple[TwoTower, ImageInput, TextInput]:
    """The model that a filled `model.preset=openclip:NAME` asks for.

    Raises:
        ConfigError: A setting contradicts the OpenCLIP model, or its weights cannot be had.
        CheckpointError: A weights file does not fit.
    """
    name = str(config.preset).removeprefix(OPENCLIP)
    whole = openclip_config(name, "model.preset")
    _refuse_contradictions(config, name, whole["embed_dim"])
    model = _create(name, config.weights, image_size, whole["text_cfg"])
    pixels = openclip_pixels(model.visual.image_size, open_clip.get_model_preprocess_cfg(model))
    tokens = openclip_tokens(name, config.text, whole["text_cfg"])
    scale = LogitScale(config.logit_scale)
    if config.weights != "random":
        _take_scale(scale, model.logit_scale)
    vision = OpenClipVision(model.visual, pixels.image_size)
    text = OpenClipText(model.text, tokens.pad_token)
    settle(vision, config.vision, "model.vision")
    settle(text, config.text, "model.text")
    frozen = frozenset(part for part in ("vision", "text") if getattr(config, part).frozen is True)
    two_tower = TwoTower(
        vision,
        text,
        {"image": nn.Identity(), "text": nn.Identity()},
        scale,
        frozen,
    )
    return two_tower, pixels.override(config.vision), tokens


def _refuse_contradictions(config: ModelConfig, name: str, width: int) -> None:
    if config.embed_dim != width:
        raise ConfigError(
            f"model.embed_dim={config.embed_dim}, but OpenCLIP's {name} is {width} wide; leave "
            f"model.embed_dim out, or name the towers (model.vision.name, model.text.name)."
        )
    for part in ("vision", "text"):
        tower = getattr(config, part)
        require_own_pooling(tower, f"model.{part}", name)
        if tower.options or tower.weights not in ("pretrained", "random"):
            raise ConfigError(
                f"model.{part}.options and .weights do not go with model.preset=openclip:{name}, "
                f"which is taken as it is: leave them out, or name the towers and no preset."
            )
    asked = config.head.model_dump(exclude_defaults=True)
    if asked:
        setting, value = next(iter(asked.items()))
        raise ConfigError(
            f"model.head.{setting}={value}, but model.preset=openclip:{name} has no head of ours; "
            f"leave model.head out, or name the towers and no preset."
        )


def _create(name: str, weights: str, image_size: int | None, text: Mapping[str, Any]) -> Any:
    tags = open_clip.list_pretrained_tags_by_model(name)
    pretrained = None if weights == "random" else weights
    if pretrained and pretrained not in tags:
        if not Path(pretrained).expanduser().is_file():
            raise ConfigError(
                f"model.weights={weights} is neither `random`, a file, nor a tag of OpenCLIP's "
                f"{name} ({', '.join(tags[:8]) or 'it has none'})."
            )
        read_weights(pretrained, "model.weights")
        pretrained = str(Path(pretrained).expanduser())
    words: dict[str, Any] = {
        "force_custom_text": True,
        "pretrained_text": False,
        "pretrained_image": False,
    }
    if image_size:
        words["force_image_size"] = image_size
    remote = pretrained in tags or is_on_hub(name) or "hf_model_name" in text
    what = f"model.weights={weights} of openclip:{name}"
    bring = "set model.weights to a file of its weights, or to random"
    if "hf_model_name" in text:
        bring = f"its text tower is hf:{text['hf_model_name']}, bring that into the local cache"
    with hub_call(what, bring, remote), _quiet():
        try:
            return open_clip.create_model(name, pretrained=pretrained, **words)
        except (RuntimeError, KeyError) as error:
            if pretrained is None or pretrained in tags:
                raise
            raise CheckpointError(
                f"model.weights={weights} does not fit OpenCLIP's {name}: "
                f"{' '.join(str(error).split())[:400]}; give the weights of this model."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back OpenCLIP's log lines, which repeat our errors and set up the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _take_scale(scale: LogitScale, own: torch.Tensor) -> None:
    with torch.no_grad():
        scale.log_scale.copy_(own.reshape(1).clamp(0.0, math.inf))
