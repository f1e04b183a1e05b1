"""`metrics.jsonl`: a JSON object a line, written while training, mended on resume, read as curves.

Floats are written so that they read back to the same bits. JSON has no NaN and no infinity: they
are written as null, which every reader takes for "no figure".
"""

import json
import math
import statistics
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config.evaluation import MAIN, MEAN, TOP1, logged
from mmscale.errors import DataError
from mmscale.outputs import replace_file

# What readers count with, by name and by the beginning of it.
_NUMBERS = frozenset({"step", "samples", "samples_per_second", "data_wait", "logit_scale", "lr"})
_NUMBERS |= {"memory_bytes", "flops_per_second", "mfu", "epoch", "captions_cut", "skipped"}
_FIGURES = ("loss", "eval/", "health/", "time/", "grad_norm")
# Python's whole numbers have no end.
_LARGEST = 2**63


class MetricsLog:
    """An open metrics file; every line is handed to the operating system as it is written.

    What a full disk does not take waits in memory for the next line: training goes on.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._warn = warn
        self._waiting = b""
        self._has_told = False

    @classmethod
    def resume(
        cls, path: Path, step: int, warn: Callable[[str], None] = lambda text: None
    ) -> "MetricsLog":
        """Open the log of a run that goes on from `step`, as if nothing later had happened.

        Lines past `step`, a `finished` line and a torn last line are cut away; the file is replaced
        in one move, and the lines that stay keep their bytes.
        """
        if path.exists():
            kept = [raw for raw, line in _lines(path) if _survives(line, step)]
            replace_file(path, b"".join(kept))
        return cls(path, warn)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        text = json.dumps(_plain(line), allow_nan=False)
        self._waiting += text.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._has_told:
                self._warn(f"metrics lines wait in memory ({error}); free disk space")
                self._has_told = True

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; a torn last line is left out.

    Raises:
        DataError: The file cannot be read, or a line before the last is not a JSON object.
    """
    return [line for _, line in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line as its bytes, newline included, and its object."""
    try:
        raw_lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error}); name a readable metrics file"
        ) from error
    for number, raw in enumerate(raw_lines, start=1):
        line = _parse(raw)
        if line is not None:
            yield raw, line
        elif number < len(raw_lines):
            raise DataError(
                f"{path} line {number}: must be a JSON object with numbers for figures; delete "
                "that line"
            )


def _parse(raw: bytes) -> dict[str, Any] | None:
    # A line without its newline was cut while it was written, even where it happens to be JSON.
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _is_told(line) else None


def _is_told(line: dict[str, Any]) -> bool:
    """Whether what is drawn and summed up is made of numbers; another's file may hold anything."""
    return all(
        value is None
        or isinstance(value, float)
        or (isinstance(value, int) and abs(value) < _LARGEST)
        for key, value in line.items()
        if key in _NUMBERS or key.startswith(_FIGURES)
    )


def _survives(line: dict[str, Any], step: int) -> bool:
    return not line.get("finished") and line.get("step", 0) <= step


def _plain(value: Any) -> Any:
    """Containers and scalars as JSON knows them; tensor and array scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return value


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


def in_columns(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
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
_OF_PAIRS = tuple(f"{way}_r{k}" for way in WAYS for k in TOP)
_OF_CLASSES = (TOP1, "top5", "mean_per_class")
# Of a set, in the order in which they are shown.
SET_FIGURES = (*_OF_PAIRS, MEAN, *_OF_CLASSES)
RECALLS = tuple(logged(MAIN, figure) for figure in _OF_PAIRS)
MEAN_RECALL = logged(MAIN, MEAN)


def mean_recall(line: Mapping[str, Any], name: str = MAIN) -> float | None:
    """Mean of a set's six, percent; None for a line that does not hold them all."""
    values = [line.get(logged(name, figure)) for figure in _OF_PAIRS]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return statistics.fmean(numbers) if len(numbers) == len(values) else None


def set_figures(line: Mapping[str, Any], name: str) -> dict[str, float]:
    """What a line says of an evaluation set, as it is logged; empty where it says nothing whole.

    Args:
        line: Of the log.
        name: The set's.

    Returns:
        Its six recalls and their mean, or its accuracies, in percent.
    """
    if (mean := mean_recall(line, name)) is not None:
        recalls = {logged(name, figure): line[logged(name, figure)] for figure in _OF_PAIRS}
        return {**recalls, logged(name, MEAN): mean}
    found = {key: line.get(key) for key in (logged(name, figure) for figure in _OF_CLASSES)}
    numbers = {key: float(value) for key, value in found.items() if isinstance(value, (int, float))}
    return numbers if logged(name, TOP1) in numbers else {}


def set_names(lines: Lines) -> list[str]:
    """Names of the evaluation sets beside `data.eval`, in the order in which they appear."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("eval/"))
    return list(dict.fromkeys(key.split("/")[1] for key in keys if key.count("/") == 2))
