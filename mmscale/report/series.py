"""From metric lines to the points of a curve."""

import statistics
from collections.abc import Container, Mapping, Sequence
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


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Rows of cells, two spaces between columns; those in `left` begin flush, others end so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


WAYS = {"i2t": "image to text", "t2i": "text to image"}
TOP = (1, 5, 10)
RECALLS = tuple(f"eval/{way}_r{k}" for way in WAYS for k in TOP)
MEAN_RECALL = "eval/mean"


def mean_recall(line: Mapping[str, Any]) -> float | None:
    """Mean of the six, percent; None for a line that does not hold them all."""
    values = [line[name] for name in RECALLS if isinstance(line.get(name), (int, float))]
    return statistics.fmean(values) if len(values) == len(RECALLS) else None
