"""`space.jsonl`: what the embedding space looked like at the evaluations, a line a moment.

The file is bounded, so a run of any length may evaluate as often as it likes. It is written anew
each time, in one move: there is no torn line.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmscale.durable import replace_file
from mmscale.errors import DataError

SPACE_NAME = "space.jsonl"
MOST_MOMENTS = 24

Moments = Sequence[Mapping[str, Any]]


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
        moments = [json.loads(line) for line in path.read_bytes().splitlines()]
        return sorted(moments, key=lambda moment: _step(moment))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not the moments of a run ({error}); remove the file, the run goes on without"
        ) from error


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


def _step(moment: Any) -> int:
    step = moment.get("step") if isinstance(moment, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError("a line without its step")
    return step
