"""What every verb needs: the command that it joins, and how it speaks and writes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import typer

from mmscale.errors import ConfigError, printable
from mmscale.outputs import write_output

app = typer.Typer(
    help="Distributed trainer for image-text dual encoders.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def say(text: str) -> None:
    """A line of the answer, on stdout."""
    try:
        typer.echo(printable(text))
    except BrokenPipeError as error:
        # Whoever read the figures has what it wanted; Python would write the rest as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error


def tell(text: str) -> None:
    """A line on stderr, beside the figures."""
    typer.echo(printable(text), err=True)


def write_json(path: Path | None, figures: Any) -> None:
    """What `--json` asked for, if it did."""
    if path is not None:
        write_output("--json", path, json.dumps(figures, indent=1).encode())


def require_there(path: Path, kind: str) -> None:
    """Refuse a path that names nothing: the command is wrong, not what it reads."""
    if not path.exists():
        raise ConfigError(f"{path}: no such {kind}; check the path")
