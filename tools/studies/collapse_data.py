"""Features for the study `collapse`: drawn, or those that a run with frozen towers cached."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mmscale.config.load import load_config
from mmscale.data.shards import ShardSet, open_shards, open_train
from mmscale.engine.encode import Encoder, encode
from mmscale.engine.inference import Inference
from mmscale.errors import ConfigError
from mmscale.evaluation.encoded import FeatureCache
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from tools.studies.given import Features

TRAIN, HELD_OUT = 4096, 500
# A world that a linear head can mostly read: two towers of different width see one meaning, each
# through its own mixing, with its own noise, a common part, and dimensions of unlike size.
MEANING, WIDTHS = 24, (160, 96)
NOISE, COMMON, UNLIKE = 0.6, 2.0, 1.0


def names_a_run(words: Sequence[str]) -> bool:
    """Whether words name a preset or a file, and so data of their own."""
    return any("=" not in word for word in words)


@lru_cache(maxsize=4)
def features_of(words: tuple[str, ...], captions: int) -> tuple[Features, Features]:
    """Training and held-out rows, with so many captions an image.

    Args:
        words: Of a run with a feature cache; without a preset or file among them pairs are drawn.
        captions: Rows an image.
    """
    if not names_a_run(words):
        return drawn(0, TRAIN // captions, captions), drawn(1, HELD_OUT // captions, captions)
    config = load_config(words)
    if config.data.feature_cache is None or config.data.eval is None:
        raise ConfigError(
            "study collapse: heads train on cached features; give data.feature_cache and "
            "data.eval, or none"
        )
    model, spec = build_model(config.model, config.data.image_size, config.run.seed)
    inference = Inference(model, choose(config.engine))
    cache = FeatureCache(Path(config.data.feature_cache), model, spec, config.data.cache_gb * 1e9)

    def rows(shards: ShardSet, most: int) -> Features:
        def make(kept):
            encoder = Encoder.of(config, inference.call, inference.device, spec, Alone())
            return encode(encoder, shards, kept=kept)

        return Features.of(cache.table(shards, Alone(), make), captions, most)

    held_out = open_shards("data.eval", config.data.eval)
    return rows(open_train(config.data), TRAIN), rows(held_out, HELD_OUT)


def drawn(part: int, images: int, captions: int) -> Features:
    """Pairs of the drawn world; `part` 0 and 1 share the world, not the pairs."""
    world = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(1 + part)
    meaning = torch.randn(images, MEANING, generator=generator)
    ids = torch.arange(images).repeat_interleave(captions)
    image, text = (_Tower(world, width) for width in WIDTHS)
    seen = image(meaning, generator)[ids]
    return Features(seen, text(meaning[ids], generator), ids)


class _Tower:
    """One tower of the drawn world."""

    def __init__(self, world: torch.Generator, width: int):
        self._mixing = torch.randn(MEANING, width, generator=world) / MEANING**0.5
        self._common = COMMON * torch.randn(width, generator=world)
        self._sizes = (UNLIKE * torch.randn(width, generator=world)).exp()

    def __call__(self, meaning: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(meaning), self._mixing.shape[1], generator=generator)
        return (torch.tanh(meaning @ self._mixing) + NOISE * noise + self._common) * self._sizes
