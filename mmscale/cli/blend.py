"""The verb that makes one model of several."""

from math import isclose, isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.command import (
    USING,
    HeldOutData,
    Json,
    Sets,
    app,
    folder_out,
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
    data: HeldOutData = None,
    sets: Sets = None,
    metric: Annotated[
        str | None,
        typer.Option(help="With --sweep, the figure to gain; default eval/mean.", metavar="FIGURE"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Points that each other set may lose.", min=0, metavar="POINTS"),
    ] = None,
    json_file: Json = None,
) -> int:
    """Average the weights of models, evaluate the mean and write it as a checkpoint.

    With --sweep and --budget the point of the line that gains most while no other set (--sets, or
    the first run's eval.sets) has lost more than the budget.
    """
    words = [model for model in models if "=" in model and not Path(model).exists()]
    paths = [Path(path_of(model, model)) for model in models if model not in words]
    shares = _shares(weights, len(paths), sweep)
    _require_effect(sweep, {"--sets": sets, "--metric": metric, "--budget": budget})
    for path in paths:
        require_there(path, "run or checkpoint")
    from mmscale.evaluation.blend import blend as mean_of
    from mmscale.evaluation.blend import open_all, require_new, write_blend
    from mmscale.evaluation.sets import read_sets

    require_new(out)
    named = None if sets is None else read_sets(sets)
    opened = open_all(paths, words)
    with_own = metric is not None or budget is not None
    held_out = _held_out(opened[0].trained, data, named, with_own)
    if sweep:
        found = _swept(opened, held_out, metric, budget)
    else:
        found = {"points": _evaluated(opened, shares, held_out), "shares": shares}
    shares = found["shares"]
    with writing("--out", out):
        write_blend(out, opened, shares, mean_of(opened, shares))
    write_json(json_file, {"models": [str(path) for path in paths], **found})
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


def _require_effect(sweep: bool, asked: dict[str, Any]) -> None:
    given = [name for name, value in asked.items() if value is not None]
    if given and not sweep:
        raise ConfigError(f"{given[0]}: has an effect only with --sweep; add it or leave this out")
    if not isfinite(asked["--budget"] or 0):
        raise ConfigError(f"--budget {asked['--budget']}: is no number of points; write 2")


def _held_out(trained: Any, data: str | None, sets: Any, with_own: bool) -> dict[str, Any]:
    """Open sets by name: the pairs of `--data` or `data.eval`, those of `--sets`, or the run's."""
    from mmscale.config.evaluation import MAIN
    from mmscale.data.shards import open_held_out
    from mmscale.evaluation.encoded import HeldOut
    from mmscale.evaluation.sets import open_named, open_own

    shards = open_held_out("--data", data, trained.config.data)
    found = {} if shards is None else {MAIN: HeldOut(shards, trained.spec, None)}
    if sets is not None:
        return found | open_named(trained, sets)
    return found | open_own(trained) if with_own else found


def _evaluated(opened: Any, shares: tuple[float, ...], held_out: dict[str, Any]) -> list[Any]:
    """The figures of a blend, told; none where no pairs are named."""
    from mmscale.evaluation.blend import blended
    from mmscale.evaluation.sets import as_logged, evaluate_opened

    if not held_out:
        return []
    ((_, trained),) = blended(opened, [shares])
    return [_told(shares, as_logged(evaluate_opened(trained, held_out)))]


def _swept(
    opened: Any, held_out: dict[str, Any], metric: str | None, budget: float | None
) -> dict[str, Any]:
    """The points of the line between two models, told as they come, and the one that is chosen."""
    from mmscale.config.evaluation import RetainConfig, set_named_in
    from mmscale.evaluation.retention import best_point, walked
    from mmscale.evaluation.sets import evaluate_opened

    if not held_out:
        raise ConfigError("--sweep compares on held-out pairs; name them with --data or --sets")
    gained = _figure_to_gain(metric, held_out)
    others = tuple(name for name in held_out if name != set_named_in(gained))
    if budget is not None and not others:
        raise ConfigError(
            f"--budget {budget:g}: there is no set beside that of {gained}, so nothing could be "
            "lost; name others with --sets"
        )
    # Without a budget nothing is retained: no point loses more than all of it.
    allowed, retained = (100.0, ()) if budget is None else (budget, others)
    settings = RetainConfig(sets=retained, budget=allowed, metric=gained)
    points, told = [], []
    for point in walked(
        opened, settings, lambda model: evaluate_opened(model, held_out), named="--metric"
    ):
        points.append(point)
        beside = {"gain": point.gain, "lost": point.lost} if retained else {}
        told.append({**_told((1 - point.share, point.share), point.figures), **beside})
        if retained:
            say(f"  {point}")
    best = best_point(points, allowed)
    if retained:
        say(f"within {allowed:g} points: {best}")
    chosen = {"metric": gained, "budget": budget, "sets": list(retained)}
    return {**chosen, "points": told, "shares": (1 - best.share, best.share)}


def _figure_to_gain(metric: str | None, held_out: dict[str, Any]) -> str:
    from mmscale.config.evaluation import HEADLINES, MAIN, MEAN, figure_fault, logged
    from mmscale.evaluation.classes import ClassSet

    if metric is not None:
        if fault := figure_fault("--metric", metric, held_out):
            raise ConfigError(fault)
        return metric
    if MAIN not in held_out and len(held_out) > 1:
        raise ConfigError(
            f"--sweep: there are several sets ({', '.join(held_out)}) and no data.eval; name the "
            f"figure to gain, such as --metric {logged(next(iter(held_out)), MEAN)}"
        )
    name = MAIN if MAIN in held_out else next(iter(held_out))
    return logged(name, HEADLINES[isinstance(held_out[name], ClassSet)])


def _told(shares: tuple[float, ...], figures: dict[str, float]) -> dict[str, Any]:
    """A blend as `--json` has it; says what its sets are judged by."""
    from mmscale.config.evaluation import HEADLINES, MAIN, PREFIX, set_named_in

    headlines = {
        set_named_in(key): value
        for key, value in figures.items()
        if key.rpartition("/")[2] in HEADLINES
    }
    words = {
        name: f"mean recall {value:.2f}" if name == MAIN else f"{name} {value:.2f}"
        for name, value in headlines.items()
    }
    say(f"{_in_words(shares)}: {', '.join(words.values())}")
    return {"shares": shares, **{k.removeprefix(PREFIX): v for k, v in figures.items()}}


def _in_words(shares: tuple[float, ...]) -> str:
    return " + ".join(f"{share:.2f}" for share in shares)
