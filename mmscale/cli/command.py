"""What every verb needs: the command that it joins, and how it speaks and writes."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmscale.config.paths import path_of
from mmscale.errors import ConfigError, printable
from mmscale.outputs import require_file, require_folder, write_output

# What a verb is for, in the order of a first use; a verb's `rich_help_panel` is one of them.
DATA = "Pairs"
BEFORE = "Before a run"
TRAINING = "Training"
LOOKING = "Looking at what was learnt"
USING = "Using a model"


class Verbs(TyperGroup):
    """The verbs by what they are for, each with the first sentence of its description whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the groups' sections into the page of `--help`."""
        verbs = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        for group in (DATA, BEFORE, TRAINING, LOOKING, USING):
            rows = [
                (name, " ".join((verb.help or "").split("\n\n")[0].split()))
                for name, verb in verbs
                if getattr(verb, "rich_help_panel", None) == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows)


app = typer.Typer(
    help="Distributed trainer for image-text dual encoders.",
    cls=Verbs,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"mmscale {importlib.metadata.version('mmscale')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Distributed trainer for image-text dual encoders."""


def complete_words(incomplete: str) -> Iterator[str]:
    """Presets and settings that begin so, for a shell's completion."""
    from mmscale.config.explain import known_settings
    from mmscale.config.load import preset_names

    known = list(known_settings())
    sections = {name.rpartition(".")[0] for name in known}
    names = [*preset_names(), *(f"{name}=" for name in known if name not in sections)]
    return (name for name in names if name.startswith(incomplete))


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


def reading(param: typer.CallbackParam, value: Any) -> Any:
    """A path or text of paths, or a list of either, with its home folder."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [reading(param, entry) for entry in value]
    text = path_of(str(value), f"{_name(param)} {value}".strip())
    return Path(text) if isinstance(value, Path) else text


def reading_places(param: typer.CallbackParam, value: Any) -> Any:
    """As `reading`, where an address may stand in the place of a path to shards."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [reading_places(param, entry) for entry in value]
    return path_of(value, f"{_name(param)} {value}".strip(), far=True)


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
Model = Annotated[
    str,
    typer.Argument(
        help="A run, a checkpoint, an export, openclip:NAME[@WEIGHTS] or hf:NAME_OR_PATH.",
        callback=reading,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the figures to this file.", callback=file_out),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG KEY=VALUE",
        help="YAML files or presets, then settings; the later one wins.",
        autocompletion=complete_words,
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
    str, typer.Option("--data", help="A packed folder, or shard globs.", callback=reading_places)
]
AnyData = Annotated[
    str | None,
    typer.Option("--data", help="A packed folder, or shard globs.", callback=reading_places),
]
HeldOutData = Annotated[
    str | None,
    typer.Option(
        "--data", help="Held-out pairs; default the run's data.eval.", callback=reading_places
    ),
]
Sets = Annotated[
    Path | None,
    typer.Option("--sets", help="Sets by name in YAML or JSON, as in eval.sets.", callback=reading),
]
