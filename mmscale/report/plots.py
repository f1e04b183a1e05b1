"""Pictures of a run: figures in, a PNG as a `data:` URI out; None where nothing can be drawn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    HALF_WIDTH,
    IMAGE_COLOUR,
    PLAIN_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
    log_axis,
    step_axis,
)
from mmscale.report.series import Lines, Series, series, smoothed

HEIGHT = 3.1  # inches, of every picture of half the page's width
RECALL_STYLES = {"r1": ("-", 1.0), "r5": ("--", 0.75), "r10": (":", 0.75)}


def draw_loss(lines: Lines, chance: float | None) -> str | None:
    """Loss of the global batch, raw and smoothed, with the level of a blind model."""
    curve = series(lines, "loss")
    if curve is None:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        _draw_raw_and_smooth(axes, curve, PLAIN_COLOUR, "smoothed", "each logged step")
        if chance is not None:
            axes.axhline(chance, color=CHANCE_COLOUR, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"chance: {chance:.2f}",
                (1, chance),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color="#64748b",
            )
        axes.set_ylabel("loss (nats)")
        step_axis(axes)
        axes.legend(loc="best")
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
            _draw_line(axes, curve, PLAIN_COLOUR)
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
                    _draw_line(
                        axes, curve, colour, f"R@{recall[1:]}", linestyle=line_style, alpha=opacity
                    )
            axes.set_title(title)
            axes.set_ylim(0, 100)
            axes.set_ylabel("recall (percent)" if way == "i2t" else "")
            step_axis(axes, num_ticks=5)
            if axes.lines:
                axes.legend(loc="best")
        return data_uri(figure)


def draw_similarity(content: Mapping[str, Any]) -> str | None:
    """Cosines of matched and unmatched pairs, each as a density.

    Args:
        content: `matched` and `unmatched`, each with `edges` and `counts`; `width` of the space.
    """
    groups = [
        (label, colour, *histogram)
        for key, label, colour in (
            ("unmatched", "unmatched pairs", TEXT_COLOUR),
            ("matched", "matched pairs", IMAGE_COLOUR),
        )
        if (histogram := _densities(content.get(key))) is not None
    ]
    if not groups:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for label, colour, edges, density in groups:
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(density, edges, color=colour, linewidth=1.5, label=label)
        width = content.get("width")
        if isinstance(width, int) and width > 0:
            deviation = 1 / math.sqrt(width)
            axes.axvspan(
                -deviation,
                deviation,
                color=CHANCE_COLOUR,
                alpha=0.25,
                linewidth=0,
                label=f"chance: 0 ± 1/√{width} = {deviation:.3f}",
            )
        axes.set_xlabel("cosine similarity of image and caption")
        axes.set_ylabel("density")
        axes.set_ylim(bottom=0)
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


def _draw_raw_and_smooth(
    axes: Axes, curve: Series, colour: str, label: str, raw_label: str | None = None
) -> None:
    axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.8, label=raw_label)
    _draw_line(axes, smoothed(curve), colour, label)


def _draw_line(
    axes: Axes, curve: Series, colour: str, label: str | None = None, **style: Any
) -> None:
    """A line; with dots where the points are so few that a reader wants to see them."""
    marker = "o" if len(curve.steps) <= 25 else None
    axes.plot(
        curve.steps, curve.values, color=colour, label=label, marker=marker, markersize=3, **style
    )


def _positive(curve: Series) -> Series | None:
    """The points that a logarithmic axis can show."""
    shown = curve.values > 0
    return Series(curve.steps[shown], curve.values[shown]) if shown.any() else None


def _densities(histogram: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges and densities, or None where the histogram is missing, empty or does not fit."""
    if not isinstance(histogram, Mapping):
        return None
    edges, counts = _floats(histogram.get("edges")), _floats(histogram.get("counts"))
    if edges is None or counts is None or len(edges) != len(counts) + 1:
        return None
    total = counts.sum()
    return (edges, counts / (total * np.diff(edges))) if total > 0 else None


def _floats(values: Any) -> np.ndarray | None:
    if not isinstance(values, Sequence) or not values:
        return None
    return np.asarray(values, dtype=np.float64)
