"""The verb that makes one model of several."""

from math import isclose
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.command import (
    USING,
    Json,
    app,
    folder_out,
    reading_places,
    require_there,
    say,
    write_json,
)
from mmscale.config.paths import path_of
from mmscale.errors import ConfigError
from mmscale.outputs import writing


@app.command(rich_help_panel=USING)
def blend(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Runs or checkpoints of one architecture, and where what they name lies now.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.", callback=folder_out)],
    weights: Annotated[
        str | None,
        typer.Option(help="Shares of the models, such as 0.3,0.7; default equal ones."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Try the line between two models, and keep its best point."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Held-out pairs; default the first run's data.eval.",
            callback=reading_places,
        ),
    ] = None,
    json_file: Json = None,
) -> int:
    """Average the weights of models, evaluate the mean and write it as a checkpoint."""
    words = [model for model in models if "=" in model and not Path(model).exists()]
    paths = [Path(path_of(model, model)) for model in models if model not in words]
    shares = _shares(weights, len(paths), sweep)
    for path in paths:
        require_there(path, "run or checkpoint")
    from mmscale.evaluation.blend import blend as mean_of
    from mmscale.evaluation.blend import line, open_all, require_new, write_blend

    require_new(out)
    opened = open_all(paths, words)
    points = _tried(opened, line() if sweep else [shares], data, is_needed=sweep)
    if sweep:
        shares = max(points, key=lambda point: float(point.mean)).shares
    with writing("--out", out):
        write_blend(out, opened, shares, mean_of(opened, shares))
    write_json(
        json_file,
        {
            "models": [str(path) for path in paths],
            "points": [{"shares": p.shares, "mean": p.mean, **p.figures} for p in points],
            "shares": shares,
        },
    )
    say(f"{_in_words(shares)}: {out}")
    return 0


def _shares(weights: str | None, models: int, sweep: bool) -> tuple[float, ...]:
    """Of each model."""
    if sweep and (models != 2 or weights is not None):
        raise ConfigError(
            f"--sweep tries the line between two models, and {models} are named"
            + (" with --weights" if weights is not None else "")
            + "; name two, without --weights"
        )
    if weights is None:
        return (1 / models,) * models
    try:
        shares = tuple(float(share) for share in weights.replace(",", " ").split())
    except ValueError as error:
        raise ConfigError(f"--weights {weights}: is no list of numbers; write 0.3,0.7") from error
    if len(shares) != models or not isclose(sum(shares), 1, abs_tol=1e-6) or min(shares) < 0:
        raise ConfigError(
            f"--weights {weights}: give each of the {models} models a share of 0 or more, so that "
            "they sum to 1"
        )
    return shares


def _tried(opened: Any, shares: Any, data: str | None, is_needed: bool) -> list[Any]:
    """Blends on held-out pairs, told as they come; none where no pairs are named."""
    from mmscale.data.shards import open_shards, open_stored
    from mmscale.evaluation.blend import tried

    where = data or opened[0].trained.config.data.eval
    if where is None:
        if is_needed:
            raise ConfigError("--sweep compares on held-out pairs; name them with --data")
        return []
    points = []
    shards = (
        open_shards("--data", data) if data else open_stored(where, opened[0].trained.config.data)
    )
    for point in tried(opened, shares, shards):
        say(f"{_in_words(point.shares)}: mean recall {point.mean:.2f}")
        points.append(point)
    return points


def _in_words(shares: tuple[float, ...]) -> str:
    return " + ".join(f"{share:.2f}" for share in shares)
