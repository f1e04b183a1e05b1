"""The cells of a grid and their results in a file.

A cell is a run's `key=value` words with labels that place it in a table; each result is one line.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mmscale.report.metrics import MetricsLog, read_metrics

Figures: TypeAlias = dict[str, Any]
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        labels: Its place in the table, such as `{"loss": "clip", "seed": 0}`; each cell
            of a grid has its own.
        words: Presets, files and `key=value` words, without a run folder.
    """

    labels: Mapping[str, Any]
    words: tuple[str, ...]

    @property
    def key(self) -> str:
        """Equal for the same run of the same place."""
        return json.dumps([dict(self.labels), list(self.words)], sort_keys=True)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^\w.,=+-]", "_", str(self).replace(" ", ","))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.labels.items())


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        labels: The cell's.
        words: The cell's.
        seconds: How long it took.
        figures: What was measured; empty where it failed.
        error: Why it failed, in one sentence.
        exit_code: As a command would have ended.
    """

    labels: Mapping[str, Any]
    words: tuple[str, ...]
    seconds: float
    figures: Figures = field(default_factory=dict)
    error: str | None = None
    exit_code: int = 0

    @property
    def cell(self) -> Cell:
        """Whose result this is."""
        return Cell(self.labels, self.words)


Measure: TypeAlias = Callable[[Cell, Path], Figures]


class Results:
    """The results of a grid in its file, one JSON line each; of two for a cell the later counts."""

    def __init__(self, path: Path):
        """Read what is there; a torn last line is cut away.

        Raises:
            DataError: A line before the last is not a result.
        """
        # None of its lines has a step: all of them survive.
        self._log = MetricsLog.resume(path, step=0)
        self._found: dict[str, Result] = {}
        for line in read_metrics(path):
            result = Result(**{**line, "words": tuple(line["words"])})
            self._found[result.cell.key] = result

    def succeeded(self, cell: Cell) -> bool:
        """Whether a cell was run and did not fail."""
        result = self._found.get(cell.key)
        return result is not None and result.error is None

    def of(self, cell: Cell) -> Result:
        """What became of a cell that was run."""
        return self._found[cell.key]

    def add(self, result: Result) -> None:
        """Keep a result."""
        self._log.write(asdict(result))
        self._found[result.cell.key] = result

    def close(self) -> None:
        """Close the file."""
        self._log.close()
