"""A set through a model for the data doctor: rows in which images and captions are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mmscale.config.load import validate, with_words
from mmscale.contracts import InputSpec
from mmscale.data.arrange import mean_by_image
from mmscale.data.caption_text import token_count, with_cleaning
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.dataset.fit import FEWEST_PAIRS, fit_of_embeddings, fit_of_features
from mmscale.diagnostics.dataset.mispaired import mispaired_pairs
from mmscale.diagnostics.dataset.shifted import (
    shifted_captions,
    shifted_embeddings,
    shifted_features,
)
from mmscale.diagnostics.dataset.verdict import DataVerdict, Looks
from mmscale.engine.encode import Encoder
from mmscale.engine.inference import Inference
from mmscale.evaluation.encoded import FeatureCache, Tell, cached_table
from mmscale.evaluation.trained import Loaded, Trained, load_named
from mmscale.model.build import build_model
from mmscale.outputs import user_cache
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone


@dataclass(frozen=True)
class Seen:
    """What a model makes of a set.

    Attributes:
        image: A row for each image that could be decoded, in the data's order.
        text: The direction of its captions' mean, of norm 1.
        places: Of the images in their set.
        together: Both sides lie in one space, which was learnt from other pairs.
        tokens: How many tokens the model makes of a caption.
        context_length: Tokens that it takes.
    """

    image: Float[Tensor, "n f"]
    text: Float[Tensor, "n g"]
    places: Int64[Tensor, " n"]
    together: bool
    tokens: Callable[[str], int]
    context_length: int


def load_seeing(model: str | None, words: Sequence[str]) -> Loaded:
    """The model that looks at a set.

    Args:
        model: As a user names it; None for the towers that `words` describe.
        words: Of a named model, where things lie now; else a configuration: presets, files and
            `key=value`.

    Raises:
        CheckpointError: Its weights are missing or damaged.
        ConfigError: There is no such model.
    """
    if model is not None:
        return load_named(model, words)
    config = with_words(validate({"data": {"train": "none"}}), words)
    built, spec = build_model(config.model, config.data.image_size, config.run.seed)
    spec = with_cleaning(spec, config.data.caption_cleaning)
    return Loaded(config, built, spec, Inference(built, choose(config.engine)))


def see(loaded: Loaded, named: bool, shards: ShardSet, workers: int, tell: Tell) -> Seen:
    """A set through a model's towers, once: their outputs are kept as those of frozen towers are.

    Args:
        loaded: The model.
        named: It was trained, not put together from towers that never met.
        shards: The set.
        workers: Processes that decode.
        tell: Takes a line where the towers are used.

    Raises:
        DataError: A shard cannot be read.
    """
    config, inference = loaded.config, loaded.inference
    for side, tower in (("vision", config.model.vision), ("text", config.model.text)):
        if not named and tower.weights == "random":
            tell(
                f"examine: model.{side}.weights=random: a tower that was never trained hardly "
                "knows which captions fit, and what is said of them is not to be relied on; name "
                "pretrained weights, or a trained model with --model"
            )
    folder = config.data.feature_cache or user_cache("features")
    limit = config.data.cache_gb * 1e9
    cache = FeatureCache(Path(folder), loaded.model, loaded.spec, limit)
    encoder = Encoder.of(config, inference.call, inference.device, loaded.spec, Alone())
    # What cannot be decoded has a verdict of its own.
    encoder = replace(encoder, workers=workers, max_damaged=1.0)
    table = cached_table(cache, shards, encoder, tell)
    owners = torch.arange(len(table.keys)).repeat_interleave(table.first.diff())
    places = (table.good & (table.first.diff() > 0)).nonzero()[:, 0]
    image, text = table.image[places], table.text
    together = named and not _heads_alone(loaded)
    if together:
        device = inference.device
        sides = inference.call("heads", image.to(device), text.to(device))
        image, text = (side.unit.float().cpu() for side in sides[:2])
    rows = F.normalize(mean_by_image(text, owners, places), dim=1)
    tokens, length = _counting(loaded.spec)
    return Seen(image, rows, places, together, tokens, length)


def _heads_alone(loaded: Loaded) -> bool:
    """Its towers are as they were made; heads learnt from the pairs say that each of them fits."""
    model = loaded.config.model
    return isinstance(loaded, Trained) and model.vision.frozen is True and model.text.frozen is True


def _counting(spec: InputSpec) -> tuple[Callable[[str], int], int]:
    return lambda caption: token_count(spec, caption), spec.context_length


@dataclass(frozen=True)
class Fitting:
    """How images and captions of a set fit.

    Attributes:
        verdicts: None where there is nothing to say.
        deviates: The standing of each pair among random ones, of mispaired ones standard normal;
            None where there are too few.
    """

    verdicts: tuple[DataVerdict | None, ...]
    deviates: Float64[Tensor, " n"] | None = None


def fitting(looks: Looks, seen: Seen, tell: Tell) -> Fitting:
    """How images and captions of a set fit.

    Args:
        looks: The set.
        seen: What a model makes of it.
        tell: Takes a line where there are too few images for a verdict.
    """
    among = looks.take(np.flatnonzero(np.isin(looks.places, seen.places.numpy())))
    shifted = shifted_embeddings if seen.together else shifted_features
    found = shifted(seen.image, seen.text)
    straight = torch.ones(len(among), dtype=torch.bool)
    for stretch in found.stretches:
        straight[stretch.first : stretch.end] = False
    rows = straight.nonzero()[:, 0]
    stretches = shifted_captions(among, found)
    if len(rows) < FEWEST_PAIRS:
        if not found.stretches:
            tell(f"examine: mispaired is told of {FEWEST_PAIRS} images, here are {len(rows)}")
        return Fitting((stretches,))
    among = among.take(rows.numpy())
    fit_of = fit_of_embeddings if seen.together else fit_of_features
    fit = fit_of(seen.image[rows], seen.text[rows], torch.from_numpy(among.ids))
    return Fitting((stretches, mispaired_pairs(among, fit)), fit.deviates)
