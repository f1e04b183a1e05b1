"""From `model.*` to the module that trains and the input it wants. Called by training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmscale.config.model import ModelConfig
from mmscale.contracts import InputSpec
from mmscale.errors import ConfigError
from mmscale.model.fusion import Fusion
from mmscale.model.heads import Head
from mmscale.model.inputs import join_inputs
from mmscale.model.presets import fill_preset, is_whole_hf, is_whole_openclip
from mmscale.model.scale import LogitScale
from mmscale.model.tower import Tower
from mmscale.model.towers import build_text, build_vision
from mmscale.model.two_tower import TwoTower


def build_model(
    config: ModelConfig, image_size: int | None, seed: int, fill: bool = True
) -> tuple[TwoTower, InputSpec]:
    """The model on the CPU in fp32, equal on every rank, and what it wants to be fed.

    Args:
        config: `model`; its preset is filled here if it is not yet.
        image_size: `data.image_size`, pixels; None takes the image tower's own.
        seed: `run.seed`. Each part draws from its own stream, so that changing one part leaves the
            first weights of the others as they were.
        fill: With the weights that `config` asks for; without, with random ones to be replaced.

    Raises:
        ConfigError: A setting is wrong, or weights cannot be had.
        CheckpointError: A weights file does not fit.
    """
    config = fill_preset(config)
    if not fill:
        config = _without_tower_weights(config)
    if is_whole_openclip(config):
        from mmscale.model.openclip_preset import build_whole_openclip

        with drawing_from(seed, 0):
            whole, pixels, tokens = build_whole_openclip(config, image_size, fill)
        whole.fusion = _build_fusion(config, whole.vision, whole.text, seed)
        return whole, join_inputs(pixels, tokens)
    if is_whole_hf(config):
        from mmscale.model.hf_preset import build_whole_hf

        with drawing_from(seed, 0):
            whole, pixels, tokens = build_whole_hf(config, image_size, fill)
        whole.fusion = _build_fusion(config, whole.vision, whole.text, seed)
        return whole, join_inputs(pixels, tokens)
    _require_whole(config)
    with drawing_from(seed, 0):
        vision, pixels = build_vision(config.vision, image_size)
    with drawing_from(seed, 1):
        text, tokens = build_text(config.text)
    heads = {}
    for part, (modality, tower) in enumerate({"image": vision, "text": text}.items(), start=2):
        with drawing_from(seed, part):
            side, key = config.head.of(modality), f"model.head.{modality}"
            heads[modality] = Head(tower.width, config.embed_dim, side, key)
    towers = {"vision": config.vision, "text": config.text}
    frozen = frozenset(name for name, tower in towers.items() if tower.frozen is True)
    fusion = _build_fusion(config, vision, text, seed)
    model = TwoTower(vision, text, heads, LogitScale(config.logit_scale), frozen, fusion)
    return model, join_inputs(pixels, tokens)


def _require_whole(config: ModelConfig) -> None:
    """Refuse both halves of one trained model without the projections between them."""
    towers = config.vision, config.text
    is_one = config.vision.name is not None and config.vision.name == config.text.name
    if not is_one or any(tower.weights == "random" for tower in towers):
        return
    raise ConfigError(
        f"model.vision.name and model.text.name are both {config.vision.name}, whose projections "
        f"and scale two towers leave out: set model.preset={config.vision.name} in their place."
    )


def _without_tower_weights(model: ModelConfig) -> ModelConfig:
    random = {"weights": "random"}
    towers = {
        "vision": model.vision.model_copy(update=random),
        "text": model.text.model_copy(update=random),
    }
    return model.model_copy(update=towers)


def _build_fusion(config: ModelConfig, vision: Tower, text: Tower, seed: int) -> Fusion | None:
    if not config.fusion.enabled:
        return None
    with drawing_from(seed, 4):
        return Fusion(vision.sequence_width, text.sequence_width, config.fusion)


@contextmanager
def drawing_from(seed: int, part: int) -> Iterator[None]:
    """Random numbers of one part of the model; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 8 + part) % 2**63)
        yield
