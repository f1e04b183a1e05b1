"""The picture of the embedding space's health: a small panel for each figure.

Known names get words; any other `health/*` figure still gets a panel of its own.
"""

import math

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    IMAGE_COLOUR,
    PLAIN_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
    step_axis,
)
from mmscale.report.series import Lines, Series, series

PREFIX = "health/"
COLUMNS = 4

_SIDES = ("image", "text")
_COLOURS = {
    "image": IMAGE_COLOUR,
    "text": TEXT_COLOUR,
    "matched": IMAGE_COLOUR,
    "unmatched": TEXT_COLOUR,
    "image to text": IMAGE_COLOUR,
    "text to image": TEXT_COLOUR,
    "by image alone": IMAGE_COLOUR,
    "by caption alone": TEXT_COLOUR,
    "plain": CHANCE_COLOUR,
    "chance": CHANCE_COLOUR,
}
_SHARED_PANELS = {
    "matched": ("cosine of pairs", "matched"),
    "unmatched": ("cosine of pairs", "unmatched"),
    "auc": ("AUC (chance 0.5)", "plain"),
    "auc_centred": ("AUC (chance 0.5)", "centred"),
    "accuracy_i2t": ("accuracy within the sample", "image to text"),
    "accuracy_t2i": ("accuracy within the sample", "text to image"),
    "accuracy_chance": ("accuracy within the sample", "chance"),
    "row_share": ("variance decided", "by image alone"),
    "column_share": ("variance decided", "by caption alone"),
}
_TITLES = {
    "delta": "pairing signal (cosine)",
    "delta_z": "pairing signal (z)",
    "d_prime": "pairing signal (d′)",
    "std_off_sqrt_d": "unmatched std · √d (isotropic 1)",
    "gap": "distance of the two centres",
    "intra": "mean cosine within a modality",
    "variance": "variance of a modality (max 1)",
    "std": "std of a coordinate",
    "rankme": "effective rank (RankMe)",
    "rankme_ratio": "effective rank / isotropic",
    "participation": "participation ratio",
    "nesum": "stable rank (NESum)",
    "cka": "CKA of image and text",
    "cka_z": "CKA of image and text (z)",
}
# Constant through a run: the size of the probe's sample.
_NOT_DRAWN = ("pairs",)

Panels = dict[str, dict[str, Series]]


def draw_health(lines: Lines) -> str | None:
    """Every `health/*` figure over the run; `X_image` and `X_text` share a panel."""
    panels = _panels(lines)
    if not panels:
        return None
    rows = math.ceil(len(panels) / COLUMNS)
    with drawing(FULL_WIDTH, 1.9 * rows + 0.4) as figure:
        grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for axes, (title, curves) in zip(grid, panels.items(), strict=False):
            _draw_panel(axes, title, curves)
        for axes in grid[len(panels) :]:
            axes.remove()
        if any(label in _SIDES for curves in panels.values() for label in curves):
            handles = [Line2D([], [], color=_COLOURS[side], label=side) for side in _SIDES]
            figure.legend(handles=handles, loc="outside upper right", ncols=2)
        return data_uri(figure)


def _draw_panel(axes: Axes, title: str, curves: dict[str, Series]) -> None:
    for label, curve in curves.items():
        marker = "o" if len(curve.steps) == 1 else None
        colour = _COLOURS.get(label, PLAIN_COLOUR)
        axes.plot(curve.steps, curve.values, color=colour, marker=marker, markersize=3, label=label)
    if any(label and label not in _SIDES for label in curves):
        axes.legend(loc="best", fontsize=7.5)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    step_axis(axes, num_ticks=4)
    axes.xaxis.label.set_fontsize(8)


def _panels(lines: Lines) -> Panels:
    """Curves by panel title, then by label; a figure alone in its panel has the label ''."""
    panels: Panels = {}
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith(PREFIX))
    for key in keys:
        name = key.removeprefix(PREFIX)
        curve = series(lines, key)
        if curve is not None and name not in _NOT_DRAWN:
            title, label = _title_and_label(name)
            panels.setdefault(title, {})[label] = curve
    return panels


def _title_and_label(name: str) -> tuple[str, str]:
    """`std_image` is the panel `std of a coordinate` and the label `image`."""
    if name in _SHARED_PANELS:
        return _SHARED_PANELS[name]
    base, _, side = name.rpartition("_")
    if side not in _SIDES or not base:
        base, side = name, ""
    return _TITLES.get(base, base.replace("_", " ")), side
