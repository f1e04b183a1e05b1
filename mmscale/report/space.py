"""`space.jsonl`: what the embedding space looked like at the evaluations, a line a moment.

The file is bounded, so a run of any length may evaluate as often as it likes. It is written anew
each time, in one move: there is no torn line.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmscale.config.explain import first_fault
from mmscale.durable import replace_file
from mmscale.errors import DataError

SPACE_NAME = "space.jsonl"
MOST_MOMENTS = 24

Moments = Sequence[Mapping[str, Any]]

# What fp64 counts one by one, and a time axis can be made of.
_LARGEST = 2**53
_Count = Annotated[int, Field(ge=0, le=_LARGEST)]
_Number = Annotated[float, Field(ge=-1e30, le=1e30)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Histogram(_Record):
    edges: list[_Number]
    counts: list[Annotated[float, Field(ge=0, le=_LARGEST)]]

    @model_validator(mode="after")
    def _fits(self) -> "_Histogram":
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("edges are one more than counts")
        if any(after <= before for before, after in pairwise(self.edges)):
            raise ValueError("edges rise")
        return self


class _Similarity(_Record):
    width: _Count | None = None
    matched: _Histogram | None = None
    unmatched: _Histogram | None = None


class _Curve(_Record):
    ranks: list[Annotated[int, Field(ge=1, le=_LARGEST)]]
    values: list[_Number]

    @model_validator(mode="after")
    def _fits(self) -> "_Curve":
        if len(self.ranks) != len(self.values):
            raise ValueError("every rank has a value")
        return self


class _Spectrum(_Record):
    image: _Curve
    text: _Curve


class _Cloud(_Record):
    ids: list[int]
    rows: str
    shown: Annotated[float, Field(ge=0, le=1)]


class _Moment(_Record):
    """What a page draws of a line; a moment of few pairs lacks the last two."""

    step: _Count
    similarity: _Similarity | None = None
    spectrum: _Spectrum | None = None
    cloud: _Cloud | None = None


class SpaceLog:
    """The moments of a run that goes on from `step`; later ones are forgotten.

    Raises:
        DataError: There is a file that cannot be read.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        found = read_space(path) if step else []
        self._moments = [moment for moment in found if moment["step"] <= step]
        self._save()

    def write(self, step: int, moment: Mapping[str, Any]) -> None:
        """Add the moment after `step`, in the place of one that is there already."""
        kept = [other for other in self._moments if other["step"] != step]
        self._moments = thinned([*kept, {"step": step, **moment}])
        self._save()

    def _save(self) -> None:
        if not self._moments:
            self._path.unlink(missing_ok=True)
            return
        lines = (json.dumps(moment, allow_nan=False) + "\n" for moment in self._moments)
        replace_file(self._path, "".join(lines).encode())


def read_space(path: Path) -> list[dict[str, Any]]:
    """Every moment of a run, in the order of their steps; none where there is no file.

    Raises:
        DataError: The file cannot be read, or a line of it is no moment.
    """
    if not path.exists():
        return []
    try:
        moments = [_parse(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else error
        raise DataError(
            f"{path}: not the moments of a run ({reason}); remove the file, the run goes on without"
        ) from error
    return sorted(moments, key=lambda moment: int(moment["step"]))


def thinned(moments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_MOMENTS`, about evenly spaced; the first and the last always stay."""
    while len(moments) > MOST_MOMENTS:
        gaps = [
            (after["step"] - before["step"], place)
            for place, (before, after) in enumerate(zip(moments, moments[2:], strict=False), 1)
        ]
        _, crowded = min(gaps)
        moments = moments[:crowded] + moments[crowded + 1 :]
    return moments


def _parse(line: bytes) -> dict[str, Any]:
    _Moment.model_validate_json(line)
    moment: dict[str, Any] = json.loads(line)
    return moment
