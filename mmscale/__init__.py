"""mmscale: a distributed trainer for image-text dual encoders.

Importing this package costs nothing: torch is imported by what needs it, so that a mistake in a
configuration is told in well under a second.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmscale.api import TrainedRun, diagnose, evaluate, train
    from mmscale.evaluation.trained import load

__all__ = ["TrainedRun", "diagnose", "evaluate", "load", "train"]
__version__ = "0.1.0"

_HOMES = {
    "TrainedRun": "mmscale.api",
    "diagnose": "mmscale.api",
    "evaluate": "mmscale.api",
    "load": "mmscale.evaluation.trained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmscale' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _TrainFile(ModuleType):
    """The file that launchers start, `mmscale/train.py`, which is a function in Python too."""

    def __call__(self, *words: Any) -> Any:
        return import_module("mmscale.api").train(*words)


class _Package(ModuleType):
    """This package: whoever imports the launched file, `mmscale.train` can be called."""

    @property
    def train(self) -> ModuleType:
        return import_module("mmscale.train")

    @train.setter
    def train(self, file: ModuleType) -> None:
        # Python binds a module to its package once it is imported.
        file.__class__ = _TrainFile


sys.modules[__name__].__class__ = _Package
