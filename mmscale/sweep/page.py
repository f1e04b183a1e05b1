"""A sweep as a table and as a page with its picture."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    GROUP_COLOURS,
    TEXT_COLOUR,
    data_uri,
    drawing,
)
from mmscale.report.metrics import in_columns
from mmscale.report.template import write_html
from mmscale.sweep.space import Choice, LogUniform, Parameter, Space
from mmscale.sweep.study import Trial
from mmscale.sweep.workers import best

PAGE = "sweep.html"
COLUMNS = 3
TOP_HEIGHT, ROW_HEIGHT = 3.0, 2.5  # inches
BEST_COLOUR, COLOUR = TEXT_COLOUR, GROUP_COLOURS[0]


def rows(space: Space, trials: Sequence[Trial]) -> list[list[str]]:
    """Heads, then every trial, the best first and those without a value last."""
    sign = -1 if space.direction == "maximize" else 1
    complete = [trial for trial in trials if trial.state == "complete"]
    order = sorted(complete, key=lambda trial: sign * (trial.value or 0.0))
    order += [trial for trial in trials if trial.state != "complete"]
    heads = ["trial", "state", space.metric, *space.parameters]
    return [heads, *(_row(space, trial) for trial in order)]


def sweep_table(space: Space, trials: Sequence[Trial]) -> str:
    """The rows as aligned text, and the best trial's words."""
    lines = [in_columns(rows(space, trials), left={1})]
    if (top := best(space, trials)) is not None:
        words = " ".join(f"{name}={value}" for name, value in top.parameters.items())
        lines.append(f"best: trial {top.number + 1}, {space.metric} {top.value:.4g}, with {words}")
    return "\n".join(lines)


def write_sweep_page(out: Path, space: Space, trials: Sequence[Trial]) -> Path:
    """Write `sweep.html` into the sweep's folder."""
    path, top = out / PAGE, best(space, trials)
    write_html(
        path,
        "sweep.html",
        title=out.resolve().name,
        metric=space.metric,
        direction=space.direction,
        rows=rows(space, trials),
        best=top.number + 1 if top else None,
        words=shlex.join(space.words(top.parameters)) if top else "",
        failed=[(trial.number + 1, trial.why) for trial in trials if trial.why],
        picture=draw_sweep(space, trials),
    )
    return path


def draw_sweep(space: Space, trials: Sequence[Trial]) -> str:
    """Values in the order of the trials, their evaluations, and values over each parameter.

    Returns:
        A PNG as the source of an `<img>`.
    """
    num_rows = math.ceil(len(space.parameters) / COLUMNS)
    heights = [TOP_HEIGHT, ROW_HEIGHT * num_rows]
    top = best(space, trials)
    with drawing(FULL_WIDTH, sum(heights)) as figure:
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
        history, curves = upper.subplots(1, 2)
        _draw_history(history, space, trials)
        _draw_curves(curves, space, trials, top)
        _draw_parameters(lower, num_rows, space, trials, top)
        return data_uri(figure)


def _draw_history(axes: Axes, space: Space, trials: Sequence[Trial]) -> None:
    for state, marker, colour in (("complete", "o", COLOUR), ("pruned", "x", CHANCE_COLOUR)):
        shown = [trial for trial in trials if trial.state == state and trial.value is not None]
        if shown:
            numbers, values = [t.number + 1 for t in shown], [t.value or 0.0 for t in shown]
            axes.plot(numbers, values, marker, color=colour, markersize=5, label=state)
    tops = [(t.number + 1, best(space, trials[: t.number + 1])) for t in trials]
    found = [(number, top.value or 0.0) for number, top in tops if top is not None]
    if found:
        axes.step(*zip(*found, strict=True), where="post", color=BEST_COLOUR, label="best so far")
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(space.metric)
    if axes.lines:
        axes.legend(loc="best")


def _draw_curves(axes: Axes, space: Space, trials: Sequence[Trial], top: Trial | None) -> None:
    for trial in trials:
        if trial.curve:
            colour = COLOUR if trial.state == "complete" else CHANCE_COLOUR
            colour = BEST_COLOUR if trial is top else colour
            evaluations = range(1, len(trial.curve) + 1)
            style = {"linewidth": 1.2, "marker": "o", "markersize": 3}
            axes.plot(evaluations, trial.curve, color=colour, **style)  # type: ignore[arg-type]
    axes.set_xlabel("evaluation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(space.metric)


def _draw_parameters(
    figure: Any, num_rows: int, space: Space, trials: Sequence[Trial], top: Trial | None
) -> None:
    grid = list(figure.subplots(num_rows, COLUMNS, squeeze=False, sharey=True).flat)
    for axes, (name, parameter) in zip(grid, space.parameters.items(), strict=False):
        for trial in trials:
            if trial.value is not None and name in trial.parameters:
                value = trial.parameters[name]
                place = parameter.texts.index(value) if isinstance(parameter, Choice) else value
                marker = "x" if trial.state == "pruned" else "o"
                colour = CHANCE_COLOUR if trial.state == "pruned" else COLOUR
                colour = BEST_COLOUR if trial is top else colour
                axes.plot(place, trial.value, marker, color=colour, markersize=5)
        _mark_range(axes, parameter)
        axes.set_xlabel(name)
    for axes in grid[len(space.parameters) :]:
        axes.remove()
    for row in range(num_rows):
        grid[row * COLUMNS].set_ylabel(space.metric)


def _mark_range(axes: Axes, parameter: Parameter) -> None:
    """The whole range, so that points at its ends are seen there."""
    if isinstance(parameter, Choice):
        axes.set_xticks(range(len(parameter.texts)), [_text(text) for text in parameter.texts])
        axes.set_xlim(-0.5, len(parameter.texts) - 0.5)
    elif isinstance(parameter, LogUniform):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(parameter.low / 1.1, parameter.high * 1.1)
    else:
        margin = 0.03 * (parameter.high - parameter.low)
        axes.set_xlim(parameter.low - margin, parameter.high + margin)


def _row(space: Space, trial: Trial) -> list[str]:
    value = "-" if trial.value is None else f"{trial.value:.4g}"
    tried = [_text(trial.parameters.get(name, "-")) for name in space.parameters]
    return [str(trial.number + 1), trial.state, value, *tried]


def _text(value: Any) -> str:
    """A parameter's value as a reader wants it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.startswith('"'):
        return str(json.loads(value))
    return str(value)
