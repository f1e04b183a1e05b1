"""Curves of a run: figures in, a PNG as a `data:` URI out; None where nothing can be drawn."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from mmscale.config.evaluation import HEADLINES
from mmscale.parallel.phases import PHASES
from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    HALF_WIDTH,
    IMAGE_COLOUR,
    PLAIN_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
    literal,
    log_axis,
    step_axis,
)
from mmscale.report.metrics import EMPTY, MEAN_RECALL, Lines, Series, series, set_names, smoothed

HEIGHT = 3.1  # inches, of every picture of half the page's width
RECALL_STYLES = {"r1": ("-", 1.0), "r5": ("--", 0.75), "r10": (":", 0.75)}


def draw_loss(lines: Lines) -> str | None:
    """Loss of the global batch, raw and smoothed, with the level of a blind model.

    The floor is that of the only term; several terms have a picture of their own.
    """
    curve = series(lines, "loss")
    if curve is None:
        return None
    terms = term_names(lines)
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        _draw_raw_and_smooth(axes, curve, PLAIN_COLOUR, "smoothed", "each logged step")
        _draw_bound(axes, lines, "loss_chance", "--", "chance")
        if len(terms) == 1:
            _draw_bound(axes, lines, f"loss/{terms[0]}_floor", ":", "floor at the current scale")
        axes.set_ylabel("loss (nats)")
        step_axis(axes)
        axes.legend(loc="best")
        return data_uri(figure)


def term_names(lines: Lines) -> list[str]:
    """The objective's terms, in the order in which they appear."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("loss/"))
    names = [key.removeprefix("loss/") for key in keys]
    return [name for name in names if not name.endswith(("_floor", "_chance", "_weight"))]


def draw_terms(lines: Lines) -> str | None:
    """Each of several terms between its floor and the value of a model that has learnt nothing."""
    curves = {
        name: curve
        for name in term_names(lines)
        if (curve := series(lines, f"loss/{name}")) is not None
    }
    if len(curves) < 2:
        return None
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    with drawing(FULL_WIDTH, 2.3 * rows + 0.3) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (name, curve) in zip(grid, curves.items(), strict=False):
            _draw_raw_and_smooth(axes, curve, PLAIN_COLOUR, "smoothed")
            _draw_bound(axes, lines, f"loss/{name}_chance", "--", "chance")
            _draw_bound(axes, lines, f"loss/{name}_floor", ":", "floor")
            axes.set_title(literal(name.replace("_", " ")))
            step_axis(axes, num_ticks=4)
            axes.legend(loc="best", fontsize=7.5)
        for axes in grid[len(curves) :]:
            axes.remove()
        return data_uri(figure)


def draw_schedule(lines: Lines) -> str | None:
    """Learning rate and logit scale, side by side."""
    panels = [
        (curve, label)
        for key, label in (
            ("lr", "learning rate"),
            ("logit_scale", "logit scale (1 / temperature)"),
        )
        if (curve := series(lines, key)) is not None
    ]
    if not panels:
        return None
    with drawing(FULL_WIDTH, 2.4) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, (curve, label) in zip(grid.flat, panels, strict=True):
            _draw_line(axes, curve, color=PLAIN_COLOUR)
            axes.set_ylabel(label)
            step_axis(axes)
        return data_uri(figure)


def draw_recall(lines: Lines) -> str | None:
    """R@1, R@5 and R@10 over the run, in both directions."""
    ways = (("i2t", "image to text", IMAGE_COLOUR), ("t2i", "text to image", TEXT_COLOUR))
    curves = {
        (way, recall): curve
        for way, _, _ in ways
        for recall in RECALL_STYLES
        if (curve := series(lines, f"eval/{way}_{recall}")) is not None
    }
    if not curves:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        for axes, (way, title, colour) in zip(
            figure.subplots(1, 2, sharey=True), ways, strict=True
        ):
            for recall, (line_style, opacity) in RECALL_STYLES.items():
                if (curve := curves.get((way, recall))) is not None:
                    style = {"linestyle": line_style, "alpha": opacity}
                    _draw_line(axes, curve, color=colour, label=f"R@{recall[1:]}", **style)
            axes.set_title(title)
            axes.set_ylim(0, 100)
            axes.set_ylabel("recall (percent)" if way == "i2t" else "")
            step_axis(axes, num_ticks=5)
            if axes.lines:
                axes.legend(loc="best")
        return data_uri(figure)


def draw_sets(lines: Lines) -> str | None:
    """Mean recall or top-1 on each evaluation set over the run, where there are several."""
    curves = {
        name: curve
        for name, key in (
            ("data.eval", MEAN_RECALL),
            *((name, f"eval/{name}/{figure}") for name in set_names(lines) for figure in HEADLINES),
        )
        if (curve := series(lines, key)) is not None
    }
    if not set_names(lines) or not curves:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for name, curve in curves.items():
            _draw_line(axes, curve, label=literal(name))
        axes.set_ylim(0, 100)
        axes.set_ylabel("mean recall or top-1 (percent)")
        step_axis(axes)
        axes.legend(loc="best")
        return data_uri(figure)


def draw_gradient_norms(lines: Lines) -> str | None:
    """Gradient norms of both towers before clipping, on a logarithmic scale."""
    curves = [
        (_positive(curve), colour, label)
        for key, colour, label in (
            ("grad_norm", CHANCE_COLOUR, "whole model"),
            ("grad_norm_vision", IMAGE_COLOUR, "image tower"),
            ("grad_norm_text", TEXT_COLOUR, "text tower"),
        )
        if (curve := series(lines, key)) is not None
    ]
    drawn = [(curve, colour, label) for curve, colour, label in curves if curve is not None]
    if not drawn:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for curve, colour, label in drawn:
            _draw_raw_and_smooth(axes, curve, colour, label)
        log_axis(axes)
        axes.set_ylabel("gradient norm before clipping")
        step_axis(axes)
        axes.legend(loc="best")
        return data_uri(figure)


def draw_balance(lines: Lines) -> str | None:
    """The image tower's gradient norm over the text tower's, on a logarithmic scale."""
    image, text = (
        {int(step): value for step, value in zip(curve.steps, curve.values, strict=True)}
        for curve in (series(lines, f"grad_norm_{side}") or EMPTY for side in ("vision", "text"))
    )
    steps = [step for step in image if image[step] > 0 and text.get(step, 0) > 0]
    if not steps:
        return None
    ratio = Series(
        np.asarray(steps, dtype=np.float64),
        np.asarray([image[step] / text[step] for step in steps]),
    )
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        axes.axhspan(
            0.1, 10, color=CHANCE_COLOUR, alpha=0.13, linewidth=0, label="within ten times"
        )
        axes.axhline(1, color=CHANCE_COLOUR, linestyle="--", linewidth=1.2)
        _draw_raw_and_smooth(axes, ratio, PLAIN_COLOUR, "smoothed")
        log_axis(axes)
        low, high = ratio.values.min(), ratio.values.max()
        axes.set_ylim(min(0.08, low / 1.3), max(12.5, high * 1.3))
        axes.set_ylabel("image tower / text tower")
        step_axis(axes)
        axes.legend(loc="best")
        return data_uri(figure)


def _draw_bound(axes: Axes, lines: Lines, key: str, line_style: str, label: str) -> None:
    if (curve := series(lines, key)) is not None:
        style = {"color": CHANCE_COLOUR, "linestyle": line_style, "linewidth": 1.3}
        _draw_line(axes, curve, label=label, **style)


def _draw_raw_and_smooth(
    axes: Axes, curve: Series, colour: str, label: str, raw_label: str | None = None
) -> None:
    axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.8, label=raw_label)
    _draw_line(axes, smoothed(curve), color=colour, label=label)


def _draw_line(axes: Axes, curve: Series, **style: Any) -> None:
    """A line; with dots where the points are so few that a reader wants to see them."""
    marker = "o" if len(curve.steps) <= 25 else None
    axes.plot(curve.steps, curve.values, marker=marker, markersize=3, **style)


def _positive(curve: Series) -> Series | None:
    """The points that a logarithmic axis can show."""
    shown = curve.values > 0
    return Series(curve.steps[shown], curve.values[shown]) if shown.any() else None


_PHASE_COLOURS = {
    "data": "#94a3b8",
    "forward": "#2563eb",
    "loss": "#0d9488",
    "backward": "#1e3a8a",
    "communication": "#ea580c",
    "optimizer": "#9333ea",
    "other": "#e2e8f0",
}
_PHASE_ORDER = ("data", *PHASES, "other")


def draw_time(lines: Lines) -> str | None:
    """Share of each phase over the run; None where no line has them."""
    curves = {name: series(lines, f"time/{name}") for name in _PHASE_ORDER}
    found = {name: smoothed(curve) for name, curve in curves.items() if curve is not None}
    if len(found) < len(_PHASE_ORDER):
        return None
    steps = found["data"].steps
    seconds = np.stack([found[name].values for name in _PHASE_ORDER])
    with drawing(FULL_WIDTH, 2.4) as figure:
        axes = figure.subplots()
        axes.stackplot(
            steps,
            100 * seconds / seconds.sum(0),
            labels=_PHASE_ORDER,
            colors=[_PHASE_COLOURS[name] for name in _PHASE_ORDER],
        )
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(PercentFormatter())
        axes.set_ylabel("share of an update")
        step_axis(axes)
        axes.margins(x=0)
        figure.legend(loc="outside right center")
        return data_uri(figure)
