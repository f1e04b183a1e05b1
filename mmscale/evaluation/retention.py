"""What a model has kept of what it could do when its run began."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmscale.config.evaluation import COUNTS, MEAN, TOP1, RetainConfig, logged
from mmscale.diagnostics.pairing import cka
from mmscale.diagnostics.pairs import one_to_one
from mmscale.errors import ConfigError
from mmscale.evaluation.blend import Blendable, blended, line
from mmscale.evaluation.sets import Evaluated, as_logged
from mmscale.evaluation.trained import Trained

RETAIN = "retain/"
GAIN, LOST = f"{RETAIN}gain", f"{RETAIN}lost"
# Images whose neighbours are compared: every pair of them is.
MOST_ROWS = 2000
NEIGHBOURS = 10


@dataclass(frozen=True)
class AtStart:
    """A model as it was at the start of its run.

    Attributes:
        figures: Of every set, as they are logged.
        rows: Unit rows of images and of their first captions, by `SET.image` and `SET.text`.
    """

    figures: Mapping[str, float]
    rows: Mapping[str, Float[Tensor, "n d"]]

    @classmethod
    def of(
        cls,
        evaluated: Mapping[str, Evaluated],
        settings: RetainConfig,
        named: str = "retain.metric",
    ) -> "AtStart":
        """From the evaluation before the first update; `named`: what names the figure to gain.

        Raises:
            ConfigError: A point is to be chosen by a figure that is not measured.
        """
        figures = as_logged(evaluated)
        if settings.budget is not None and settings.metric not in figures:
            known = [name for name in figures if name.rpartition("/")[2] not in COUNTS]
            raise ConfigError(
                f"{named}={settings.metric}: the evaluation measures {', '.join(known)}; name one "
                "of these"
            )
        rows: dict[str, Tensor] = {}
        for name in settings.sets:
            rows |= {f"{name}.{side}": value for side, value in _rows_of(evaluated[name])}
        return cls(figures, rows)


def retained(
    evaluated: Mapping[str, Evaluated], start: AtStart, settings: RetainConfig
) -> dict[str, float]:
    """What was gained and lost since the start, as it is logged.

    `retain/gain` and `retain/lost` in points: of `retain.metric`, and of the retained set that has
    lost most. By set `retain/SET/lost`; of pairs the share of an image's nearest images that are
    the same, and the CKA of either modality's rows to those at the start.

    Args:
        evaluated: An evaluation of all sets.
        start: That before the first update.
        settings: `retain`.
    """
    figures = as_logged(evaluated)
    found: dict[str, float] = {}
    if settings.metric in figures:
        found[GAIN] = figures[settings.metric] - start.figures[settings.metric]
    lost = {name: _lost(name, evaluated[name], start) for name in settings.sets}
    found[LOST] = max(lost.values(), default=0.0)
    for name, points in lost.items():
        found[f"{RETAIN}{name}/lost"] = points
        for side, rows in _rows_of(evaluated[name]):
            before = start.rows[f"{name}.{side}"]
            found[f"{RETAIN}{name}/cka_{side}"] = cka(before, rows)[0]
            if side == "image":
                found[f"{RETAIN}{name}/neighbours"] = same_neighbours(before, rows)
    return found


def _lost(name: str, evaluated: Evaluated, start: AtStart) -> float:
    headline = MEAN if evaluated.pairs is not None else TOP1
    return start.figures[logged(name, headline)] - evaluated.figures[headline]


def _rows_of(evaluated: Evaluated) -> Iterator[tuple[str, Tensor]]:
    if evaluated.pairs is not None:
        rows = one_to_one(evaluated.pairs, MOST_ROWS)
        yield "image", rows.image.float()
        yield "text", rows.text.float()


def same_neighbours(
    before: Float[Tensor, "n d"], after: Float[Tensor, "n d"], count: int = NEIGHBOURS
) -> float:
    """Mean share of a row's nearest rows before that are among its nearest afterwards.

    Args:
        before: Unit rows.
        after: Those of the same samples.
        count: How many neighbours; cut to all others.
    """
    count = min(count, len(before) - 1)
    if count < 1:
        return 1.0
    both = _nearest(before, count) & _nearest(after, count)
    return float(both.sum(dim=1).float().mean()) / count


def _nearest(rows: Float[Tensor, "n d"], count: int) -> Bool[Tensor, "n n"]:
    similar = rows @ rows.T
    similar.fill_diagonal_(-torch.inf)
    chosen = torch.zeros_like(similar, dtype=torch.bool)
    return chosen.scatter_(1, similar.topk(count, dim=1).indices, True)


@dataclass(frozen=True)
class Point:
    """A model on the line between two, such as a run's start and its end.

    Attributes:
        share: Of the second in its weights.
        gain: Points of `retain.metric` above the first's.
        lost: Points below the first's of the retained set that has lost most.
        figures: Of all sets, as they are logged.
    """

    share: float
    gain: float
    lost: float
    figures: dict[str, float]

    def __str__(self) -> str:
        return f"{self.gain:+.2f} points gained, {self.lost:.2f} lost"


def walked(
    models: Sequence[Blendable],
    settings: RetainConfig,
    evaluate: Callable[[Trained], Mapping[str, Evaluated]],
    start: AtStart | None = None,
    named: str = "retain.metric",
) -> Iterator[Point]:
    """Points on the line between two models, from the first to the second.

    Args:
        models: Both.
        settings: What counts as gain, and which sets are retained.
        evaluate: All sets, by a model with the weights of a point.
        start: What gain and loss are counted from; None: the first point.
        named: What names the figure to gain, for messages.

    Raises:
        ConfigError: That figure is not measured.
    """
    for (_, share), trained in blended(models, line()):
        found = evaluate(trained)
        start = start or AtStart.of(found, settings, named)
        figures = retained(found, start, settings)
        yield Point(share, figures[GAIN], figures[LOST], as_logged(found))


def best_point(points: list[Point], budget: float) -> Point:
    """The point that gains most of those that lose at most `budget`: the start loses nothing."""
    within = [point for point in points if point.lost <= budget]
    return max(within, key=lambda point: point.gain)
