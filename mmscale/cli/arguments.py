"""Arguments and options that verbs share, and what is done with a path before the work begins.

In what is read `~` is expanded; what is written is besides checked to be writable.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.config.paths import path_of
from mmscale.outputs import require_file, require_folder


def reading(param: typer.CallbackParam, value: Any) -> Any:
    """A path or text of paths, or a list of either, with its home folder."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [reading(param, entry) for entry in value]
    text = path_of(str(value), f"{_name(param)} {value}".strip())
    return Path(text) if isinstance(value, Path) else text


def file_out(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A file that is written at the end."""
    path: Path | None = reading(param, value)
    if path is not None:
        require_file(_name(param), path)
    return path


def folder_out(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A folder that is filled."""
    path: Path | None = reading(param, value)
    if path is not None:
        require_folder(_name(param), path)
    return path


def _name(param: typer.CallbackParam) -> str:
    """Of an option; an argument is known by its value."""
    return param.opts[0] if param.param_type_name == "option" else ""


Run = Annotated[
    Path, typer.Argument(help="A run folder or one of its checkpoints.", callback=reading)
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the figures to this file.", callback=file_out),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG KEY=VALUE", help="YAML files or presets, then settings; the later one wins."
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Where what the run names lies now, such as model.text.name=hf:FOLDER.",
    ),
]
LeftOut = Annotated[
    float,
    typer.Option(help="Share of images that may be missing or useless; 1: any.", min=0, max=1),
]
Workers = Annotated[int, typer.Option(help="Processes.", min=1)]
Data = Annotated[
    str, typer.Option("--data", help="A packed folder, or shard globs.", callback=reading)
]
