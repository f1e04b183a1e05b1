"""A run's gain on its own set against its loss on those that it is to retain."""

from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmscale.config.evaluation import HEADLINES, logged
from mmscale.config.explain import first_fault
from mmscale.errors import DataError
from mmscale.report.figure import (
    CHANCE_COLOUR,
    GROUP_COLOURS,
    HALF_WIDTH,
    IMAGE_COLOUR,
    PLAIN_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
    literal,
)
from mmscale.report.metrics import Lines
from mmscale.report.plots import HEIGHT

# In the run's folder: the line between its first and its last weights.
LINE_NAME = "retention.json"

_Points = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Point(_Record):
    share: Annotated[float, Field(ge=0, le=1)]
    gain: _Points
    lost: _Points
    figures: dict[str, float] = Field(default_factory=dict)


class RetentionLine(_Record):
    """What `retention.json` says.

    Attributes:
        budget: Points that a retained set may lose.
        chosen: Share of the last weights in the model that was chosen.
        sets: Those that are retained.
        points: Between the first and the last weights.
    """

    budget: Annotated[float, Field(allow_inf_nan=False, ge=0)]
    chosen: Annotated[float, Field(ge=0, le=1)]
    sets: Annotated[list[str], Field(max_length=1000)] = []
    points: Annotated[list[_Point], Field(min_length=1, max_length=1000)]

    def lost_by_set(self) -> dict[str, list[float]]:
        """Points that each set has lost at each point, of the sets whose figures are there."""
        first = self.points[0].figures
        found = {}
        for name in self.sets:
            for key in (logged(name, headline) for headline in HEADLINES):
                values = [point.figures.get(key) for point in self.points]
                numbers = [value for value in values if value is not None and isfinite(value)]
                if len(numbers) == len(values):
                    found[name] = [first[key] - value for value in numbers]
        return found


def read_line(path: Path) -> RetentionLine | None:
    """The line of a run's end; None where none was walked.

    Raises:
        DataError: The file is none of these.
    """
    try:
        return RetentionLine.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        told = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{path}: is no line of a run ({told}); train it anew") from error


def draw_retention(lines: Lines, line: RetentionLine | None) -> str | None:
    """Gain over loss: of the evaluations while it trained, and between its first and last weights.

    Args:
        lines: The run's log.
        line: What its end has tried.
    """
    course = [
        (entry["retain/lost"], entry["retain/gain"])
        for entry in lines
        if all(isinstance(entry.get(f"retain/{name}"), float | int) for name in ("lost", "gain"))
    ]
    if not course:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        lost, gain = zip(*course, strict=True)
        axes.plot(lost, gain, color=PLAIN_COLOUR, marker="o", markersize=3, label="evaluations")
        if line is not None:
            between = [(point.lost, point.gain) for point in line.points]
            lost, gain = zip(*between, strict=True)
            style: dict[str, Any] = {"linestyle": "--", "marker": ".", "markersize": 5}
            label = "between first and last weights"
            axes.plot(lost, gain, label=label, color=IMAGE_COLOUR, **style)
            by_set = line.lost_by_set() if len(line.sets) > 1 else {}
            for (name, points), colour in zip(by_set.items(), cycle(GROUP_COLOURS)):
                label = f"{literal(name)} alone"
                axes.plot(points, gain, label=label, color=colour, linewidth=0.9)
            chosen = next((p for p in line.points if p.share == line.chosen), line.points[0])
            label = f"chosen: {chosen.share:.0%} of the last"
            axes.plot(chosen.lost, chosen.gain, "*", color=TEXT_COLOUR, markersize=11, label=label)
            axes.axvline(line.budget, color=CHANCE_COLOUR, linestyle=":", label="budget")
        axes.set_xlabel("lost on retained sets (points)")
        axes.set_ylabel("gained (points)")
        axes.legend(loc="best")
        return data_uri(figure)
