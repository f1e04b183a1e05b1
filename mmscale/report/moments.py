"""The embedding space over a run: how similar pairs are and how many directions are used.

Moments in (as `space.jsonl` holds them), a PNG as a `data:` URI out; None where nothing can be
drawn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    HALF_WIDTH,
    IMAGE_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
)
from mmscale.report.space import Moments

HEIGHT = 3.4  # inches
SPECTRUM_HEIGHT = 3.0
MOST_SHOWN = 7

_GROUPS = (
    ("unmatched", "unmatched pairs", TEXT_COLOUR),
    ("matched", "matched pairs", IMAGE_COLOUR),
)
Histogram = tuple[NDArray[np.float64], NDArray[np.float64]]


def spaced(moments: Moments, most: int = MOST_SHOWN) -> Moments:
    """At most so many of the moments, evenly, with the first and the last."""
    if len(moments) <= most:
        return moments
    return [moments[place] for place in np.linspace(0, len(moments) - 1, most).round().astype(int)]


def draw_similarity(moments: Moments) -> str | None:
    """Cosines of matched and unmatched pairs at the last moment, each as a density."""
    if not moments:
        return None
    content = moments[-1].get("similarity")
    groups = _histograms(content)
    if not groups or not isinstance(content, Mapping):
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for label, colour, (edges, density) in groups:
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(density, edges, color=colour, linewidth=1.5, label=label)
        _draw_isotropic(axes, content)
        axes.set_xlabel("cosine similarity of image and caption")
        axes.set_ylabel("density")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
        return data_uri(figure)


def draw_similarity_over_time(moments: Moments) -> str | None:
    """The hills of matched and unmatched pairs at several moments, the latest at the bottom."""
    held = [(moment, _histograms(moment.get("similarity"))) for moment in moments]
    shown = spaced([{"step": moment["step"], "hills": hills} for moment, hills in held if hills])
    if len(shown) < 2:
        return None
    with drawing(HALF_WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for place, moment in enumerate(shown):
            for label, colour, (edges, density) in moment["hills"]:
                # Each hill is as high as the others: what counts is where it stands.
                heights = 1.25 * density / density.max() - place
                line = np.where(density > 0, heights, np.nan)
                middles = (edges[1:] + edges[:-1]) / 2
                style = {"color": colour, "zorder": 2 + place}
                axes.fill_between(middles, -place, heights, alpha=0.25, linewidth=0, **style)
                axes.plot(middles, line, linewidth=1.2, label=None if place else label, **style)
        axes.set_yticks([-place for place in range(len(shown))])
        axes.set_yticklabels([f"step {moment['step']:,}" for moment in shown])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(shown) + 0.85, 1.9)
        axes.set_xlabel("cosine similarity of image and caption")
        axes.legend(loc="upper left", ncols=2)
        return data_uri(figure)


def draw_spectrum(moments: Moments) -> str | None:
    """Eigenvalues of the covariance of each side, at several moments, on logarithmic scales."""
    held = [
        {"step": moment["step"], "sides": sides}
        for moment in moments
        if len(sides := _spectra(moment.get("spectrum"))) == 2
    ]
    shown = spaced(held)
    if not shown:
        return None
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, len(shown)))
    with drawing(FULL_WIDTH, SPECTRUM_HEIGHT) as figure:
        for side, axes in zip(("image", "text"), figure.subplots(1, 2, sharey=True), strict=True):
            for moment, colour in zip(shown, colours, strict=True):
                ranks, values = moment["sides"][side]
                axes.plot(ranks, values, color=colour, linewidth=1.4, label=f"{moment['step']:,}")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{side}s" if side == "image" else "captions")
            axes.set_xlabel("direction, by variance")
        figure.axes[0].set_ylabel("variance along it")
        figure.axes[0].legend(title="step", loc="lower left", fontsize=7.5, title_fontsize=7.5)
        return data_uri(figure)


def _draw_isotropic(axes: Axes, content: Mapping[str, Any]) -> None:
    """The band in which cosines of random directions lie."""
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


def _histograms(content: Any) -> list[tuple[str, str, Histogram]]:
    """Label, colour and density of each group that has one."""
    if not isinstance(content, Mapping):
        return []
    return [
        (label, colour, histogram)
        for key, label, colour in _GROUPS
        if (histogram := _densities(content.get(key))) is not None
    ]


def _densities(histogram: Any) -> Histogram | None:
    """Edges and densities, or None where the histogram is missing, empty or does not fit."""
    if not isinstance(histogram, Mapping):
        return None
    edges, counts = _floats(histogram.get("edges")), _floats(histogram.get("counts"))
    if edges is None or counts is None or len(edges) != len(counts) + 1:
        return None
    total = counts.sum()
    return (edges, counts / (total * np.diff(edges))) if total > 0 else None


def _spectra(content: Any) -> dict[str, Histogram]:
    """Ranks and the eigenvalues above zero of each side that has them."""
    spectra = {}
    for side in ("image", "text"):
        held = content.get(side) if isinstance(content, Mapping) else None
        if not isinstance(held, Mapping):
            continue
        ranks, values = _floats(held.get("ranks")), _floats(held.get("values"))
        if ranks is not None and values is not None and len(ranks) == len(values):
            # What is left below this is the rounding of fp32 rows.
            above = values > 1e-12
            if above.any():
                spectra[side] = ranks[above], values[above]
    return spectra


def _floats(values: Any) -> NDArray[np.float64] | None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
