"""mmscale: a distributed trainer for image-text dual encoders.

Importing this package costs nothing: torch is imported by what needs it, so that a mistake in a
configuration is told in well under a second.
"""

from importlib import import_module
from os import PathLike
from typing import Any

__version__ = "0.1.0"


def load(path: str | PathLike[str], *words: str) -> Any:
    """A model, its evaluation transform and its tokenizer.

    `model.encode_image(pixels)` and `model.encode_text(tokens)` give embeddings as OpenCLIP's do.

    Args:
        path: A run folder, one of its checkpoints, an export, `openclip:NAME@WEIGHTS` or
            `hf:NAME_OR_PATH`.
        words: `key=value`, where a tower that the run names lies elsewhere now:
            `model.text.name=hf:FOLDER`, or where it shall run: `engine.device=cpu`.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    return import_module("mmscale.evaluation.trained").load(path, *words)
