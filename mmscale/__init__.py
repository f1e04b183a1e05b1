"""mmscale: a distributed trainer for image-text dual encoders.

Importing this package costs nothing: torch is imported by what needs it, so that a mistake in a
configuration is told in well under a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmscale.api import TrainedRun, diagnose, evaluate, train
    from mmscale.evaluation.trained import load

__all__ = ["TrainedRun", "diagnose", "evaluate", "load", "train"]
__version__ = "0.1.0"

# `train` is the launched file too, which is called as a function (mmscale/train.py).
_HOMES = {
    "TrainedRun": "mmscale.api",
    "diagnose": "mmscale.api",
    "evaluate": "mmscale.api",
    "load": "mmscale.evaluation.trained",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("mmscale.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'mmscale' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
