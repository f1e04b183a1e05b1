"""`space.jsonl`: what the embedding space looked like at the evaluations, and pictures of it.

The file is bounded, so a run of any length may evaluate as often as it likes. It is written anew
each time, in one move: there is no torn line.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmscale.config.explain import first_fault
from mmscale.errors import DataError
from mmscale.outputs import replace_file
from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    HALF_WIDTH,
    IMAGE_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
)

SPACE_NAME = "space.jsonl"
MOST_MOMENTS = 24

Moments = Sequence[Mapping[str, Any]]

# What fp64 counts one by one, and a time axis can be made of.
_LARGEST = 2**53
_Count = Annotated[int, Field(ge=0, le=_LARGEST)]
_Number = Annotated[float, Field(ge=-1e30, le=1e30)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Histogram(_Record):
    edges: list[_Number]
    counts: list[Annotated[float, Field(ge=0, le=_LARGEST)]]

    @model_validator(mode="after")
    def _fits(self) -> "_Histogram":
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("edges are one more than counts")
        if any(after <= before for before, after in pairwise(self.edges)):
            raise ValueError("edges rise")
        return self


class _Similarity(_Record):
    width: _Count | None = None
    matched: _Histogram | None = None
    unmatched: _Histogram | None = None


class _Curve(_Record):
    ranks: list[Annotated[int, Field(ge=1, le=_LARGEST)]]
    values: list[_Number]

    @model_validator(mode="after")
    def _fits(self) -> "_Curve":
        if len(self.ranks) != len(self.values):
            raise ValueError("every rank has a value")
        return self


class _Spectrum(_Record):
    image: _Curve
    text: _Curve


class _Cloud(_Record):
    ids: list[int]
    rows: str
    shown: Annotated[float, Field(ge=0, le=1)]


class _Moment(_Record):
    """What a page draws of a line; a moment of few pairs lacks the last two."""

    step: _Count
    similarity: _Similarity | None = None
    spectrum: _Spectrum | None = None
    cloud: _Cloud | None = None


class SpaceLog:
    """The moments of a run that goes on from `step`; later ones are forgotten.

    Raises:
        DataError: There is a file that cannot be read.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        found = read_space(path) if step else []
        self._moments = [moment for moment in found if moment["step"] <= step]
        self._save()

    def write(self, step: int, moment: Mapping[str, Any]) -> None:
        """Add the moment after `step`, in the place of one that is there already."""
        kept = [other for other in self._moments if other["step"] != step]
        self._moments = thinned([*kept, {"step": step, **moment}])
        self._save()

    def _save(self) -> None:
        if not self._moments:
            self._path.unlink(missing_ok=True)
            return
        lines = (json.dumps(moment, allow_nan=False) + "\n" for moment in self._moments)
        replace_file(self._path, "".join(lines).encode())


def read_space(path: Path) -> list[dict[str, Any]]:
    """Every moment of a run, in the order of their steps; none where there is no file.

    Raises:
        DataError: The file cannot be read, or a line of it is no moment.
    """
    if not path.exists():
        return []
    try:
        moments = [_parse(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else error
        raise DataError(
            f"{path}: not the moments of a run ({reason}); remove the file, the run goes on without"
        ) from error
    return sorted(moments, key=lambda moment: int(moment["step"]))


def thinned(moments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_MOMENTS`, about evenly spaced; the first and the last always stay."""
    while len(moments) > MOST_MOMENTS:
        gaps = [
            (after["step"] - before["step"], place)
            for place, (before, after) in enumerate(zip(moments, moments[2:], strict=False), 1)
        ]
        _, crowded = min(gaps)
        moments = moments[:crowded] + moments[crowded + 1 :]
    return moments


def _parse(line: bytes) -> dict[str, Any]:
    _Moment.model_validate_json(line)
    moment: dict[str, Any] = json.loads(line)
    return moment


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
        if len(shown) > 1:
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
