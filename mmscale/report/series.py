"""From metric lines to the points of a curve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lines = Sequence[Mapping[str, Any]]
SMOOTHING_SHARE = 0.02  # of a curve's points: the time constant of the average drawn over it


@dataclass(frozen=True)
class Series:
    """A figure over the course of a run; steps rise."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


EMPTY = Series(np.empty(0), np.empty(0))


def series(lines: Lines, key: str) -> Series | None:
    """The points of one figure, or None where no line holds it.

    Values that are not finite numbers are left out; of two lines for a step the later one counts.
    """
    points = {
        line["step"]: float(line[key])
        for line in lines
        if _is_number(line.get("step")) and _is_number(line.get(key))
    }
    finite = sorted((step, value) for step, value in points.items() if np.isfinite(value))
    if not finite:
        return None
    steps, values = zip(*finite, strict=True)
    return Series(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64))


def smoothed(curve: Series) -> Series:
    """Exponential average over the points, without the pull towards its first value."""
    keep = 1 - 1 / max(1.0, SMOOTHING_SHARE * len(curve.values))
    averages = np.empty_like(curve.values)
    total = weight = 0.0
    for index, value in enumerate(curve.values):
        total = keep * total + value
        weight = keep * weight + 1
        averages[index] = total / weight
    return Series(curve.steps, averages)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
