"""The look that all pictures share, and a picture's way into a page."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from mmscale.report.console import clean

HALF_WIDTH = 5.4  # inches; two such pictures stand side by side on the page
FULL_WIDTH = 11.0
DPI = 170  # about two dots a page pixel, for sharp screens

IMAGE_COLOUR = "#2563eb"  # whatever belongs to the image side
TEXT_COLOUR = "#ea580c"  # whatever belongs to the text side
PLAIN_COLOUR = "#334155"
CHANCE_COLOUR = "#94a3b8"
# For what belongs to neither side, such as runs over one another; taken in this order.
GROUP_COLOURS = (
    "#0f766e",
    "#c2410c",
    "#6d28d9",
    "#0284c7",
    "#a16207",
    "#be185d",
    "#4d7c0f",
    "#475569",
)

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#334155",
    "axes.edgecolor": "#94a3b8",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.use_mathtext": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@contextmanager
def drawing(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Figure]:
    """An empty white figure in the shared style; sizes in inches.

    Without a layout the drawer makes the room for labels: much faster with many panels.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def step_axis(axes: Axes, num_ticks: int = 7) -> None:
    """Label the lower axis as updates: whole numbers, about `num_ticks` of them."""
    axes.set_xlabel("step (updates)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_ticks, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def log_axis(axes: Axes) -> None:
    """A logarithmic upright axis with plain figures at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def literal(text: str) -> str:
    """A text that may come from a file, kept from being read as mathematics."""
    return clean(text).replace("$", r"\$")


def png(figure: Figure, transparent: bool = False) -> bytes:
    """The figure as a PNG file, on white or without a ground of its own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=transparent)
    return buffer.getvalue()


def as_uri(picture: bytes) -> str:
    """A PNG as an `<img>` takes it for its source."""
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def data_uri(figure: Figure) -> str:
    """The figure as the source of an `<img>`, on the page's own ground."""
    return as_uri(png(figure, transparent=True))
