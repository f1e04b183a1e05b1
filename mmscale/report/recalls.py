"""The six recalls of an evaluation line, and the one figure that they are summed up by."""

import statistics
from collections.abc import Mapping
from typing import Any

WAYS = {"i2t": "image to text", "t2i": "text to image"}
TOP = (1, 5, 10)
RECALLS = tuple(f"eval/{way}_r{k}" for way in WAYS for k in TOP)
MEAN_RECALL = "eval/mean"


def mean_recall(line: Mapping[str, Any]) -> float | None:
    """Mean of the six, percent; None for a line that does not hold them all."""
    values = [line[name] for name in RECALLS if isinstance(line.get(name), (int, float))]
    return statistics.fmean(values) if len(values) == len(RECALLS) else None
