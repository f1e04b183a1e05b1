"""Means of trained models of one architecture: soups, and points on the line between two.

Sources: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), uniform soup; Wortsman et al. 2022,
    "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), the line between the weights before
    and after fine-tuning.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmscale.checkpoint.files import PARTIAL, Checkpoint
from mmscale.checkpoint.state import BLEND
from mmscale.checkpoint.write import Kept, publish_if_whole, take_snapshot, write_share
from mmscale.config.model import AdapterConfig
from mmscale.config.schema import Config
from mmscale.contracts import NamedTensor, World
from mmscale.errors import CheckpointError, ConfigError
from mmscale.evaluation.trained import Trained, load_trained
from mmscale.model.adapters import adapted, merge_adapter

# Points on the line between two models, both ends among them.
POINTS = 11

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Blendable:
    """A model that takes part.

    Attributes:
        trained: As it is evaluated, with adapters merged into its towers.
        weights: Its tensors by name, in memory of their own.
    """

    trained: Trained
    weights: Weights


def open_all(paths: Sequence[Path], words: Sequence[str] = ()) -> list[Blendable]:
    """The models of runs and checkpoints.

    Args:
        paths: One or more.
        words: `key=value`: where what they name lies now.

    Raises:
        CheckpointError: One is damaged, or of another architecture than the first.
        ConfigError: A word would make it another model.
    """
    models: list[Blendable] = []
    for path in paths:
        models.append(_opened(path, words))
        _require_same_architecture(models[0], models[-1])
    return models


def _opened(path: Path, words: Sequence[str]) -> Blendable:
    trained = load_trained(path, words)
    for tower in (trained.model.vision, trained.model.text):
        # Two matrices of an adapter are multiplied: a mean of each is not the mean of the models.
        if adapted(tower):
            merge_adapter(tower)
    state = trained.model.state_dict()
    return Blendable(trained, {name: value.to("cpu", copy=True) for name, value in state.items()})


def _require_same_architecture(first: Blendable, other: Blendable) -> None:
    shapes, theirs = (
        {name: list(value.shape) for name, value in model.weights.items()}
        for model in (first, other)
    )
    for name in {**shapes, **theirs}:
        if shapes.get(name) != theirs.get(name):
            ours, there = (found.get(name, "missing") for found in (shapes, theirs))
            raise CheckpointError(
                f"{other.trained.checkpoint.folder}: of another architecture than "
                f"{first.trained.checkpoint.folder}: {name} is {there} there, {ours} here; blend "
                "models of one architecture"
            )


def blend(models: Sequence[Blendable], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the models' weights.

    Counted in float64; a model whose share is 1 is given back bit for bit. What is no floating
    point number, such as a count of batches, is that of the model with the largest share.

    Args:
        models: Of one architecture.
        shares: One a model; they sum to 1.
    """
    used = [(model.weights, share) for model, share in zip(models, shares, strict=True) if share]
    largest = max(used, key=lambda each: each[1])[0]
    return {name: _mean(used, name, value) for name, value in largest.items()}


def _mean(used: list[tuple[Weights, float]], name: str, largest: Tensor) -> Tensor:
    if len(used) == 1 or not largest.is_floating_point():
        return largest.clone()
    mean = torch.zeros(largest.shape, dtype=torch.float64)
    for weights, share in used:
        mean += share * weights[name].double()
    return mean.to(largest.dtype)


def line(points: int = POINTS) -> Iterator[tuple[float, float]]:
    """Shares of two models at points on the line between them, from the first to the second."""
    for point in range(points):
        second = point / (points - 1)
        yield 1 - second, second


def blended(
    models: Sequence[Blendable], shares: Iterable[tuple[float, ...]]
) -> Iterator[tuple[tuple[float, ...], Trained]]:
    """Blends one after the other: their shares, and the first model with their weights."""
    first = models[0].trained
    own = first.model.state_dict()
    for each in shares:
        with torch.no_grad():
            for name, value in blend(models, each).items():
                own[name].copy_(value)
        yield each, first


def require_new(folder: Path) -> None:
    """Refuse a folder that holds something: a checkpoint is written whole, and replaces nothing.

    Raises:
        ConfigError: It does.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: holds something already; name a new folder")


def write_blend(
    folder: Path, models: Sequence[Blendable], shares: Sequence[float], weights: Weights
) -> None:
    """Write a checkpoint of blended weights, with the settings of the first model's run.

    It has no optimizer state: a run begins with it by `model.weights`, and does not go on from it.

    Args:
        folder: Of the checkpoint; new, or one that is replaced.
        models: What was blended.
        shares: Of each.
        weights: As `blend` gives them.
    """
    first, last = models[0].trained.checkpoint, models[-1].trained.checkpoint
    sources = [model.trained.checkpoint.folder.name for model in models]
    snapshot = take_snapshot(
        replace(last.state, stage=first.state.stage, best=None, scaler={}),
        {BLEND: {"of": sources, "shares": list(shares)}},
        Kept(_config(first), first.contents, {name: first.attached(name) for name in first.files}),
        [NamedTensor(name, value, {}) for name, value in weights.items()],
        {},
        World(),
    )
    aside = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_share(snapshot, aside)
    publish_if_whole(aside)


def _config(first: Checkpoint) -> dict[str, object]:
    """Of the first model's run, for a model whose adapters are merged and whose mean is taken."""
    config: Config = first.config
    towers = {
        name: getattr(config.model, name).model_copy(update={"adapter": AdapterConfig()})
        for name in ("vision", "text")
    }
    model = config.model.model_copy(update=towers)
    evaluated = config.eval.model_copy(update={"weights": "trained"})
    dumped: dict[str, object] = config.model_copy(
        update={"model": model, "eval": evaluated}
    ).model_dump(mode="json")
    return dumped
