"""Every argument and option of the command that names a path is treated as one."""

import inspect
from pathlib import Path
from typing import Any, get_args

from mmscale.cli import app
from mmscale.cli.command import file_out, folder_out, reading, reading_places

OURS = (reading, reading_places, file_out, folder_out)
# Text that names files too, by the name of the parameter.
TEXTS = {"data", "cluster", "name"}


def _parameters() -> list[tuple[str, str, Any]]:
    """Verb, parameter and annotation of everything that a verb takes."""
    return [
        (command.callback.__name__, name, parameter.annotation)
        for command in app.registered_commands
        for name, parameter in inspect.signature(command.callback).parameters.items()
    ]


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(_holds_path(inner) for inner in get_args(annotation))


def test_paths_have_one_of_four_treatments():
    parameters = _parameters()
    assert len(parameters) > 20
    bare = [
        f"{verb} {name}"
        for verb, name, annotation in parameters
        if (_holds_path(annotation) or name in TEXTS)
        and not any(getattr(mark, "callback", None) in OURS for mark in get_args(annotation)[1:])
    ]
    assert not bare
