"""Pictures of the embedding space's health: a small panel for each figure, in groups.

Known names get words; any other `health/*` figure still gets a panel of its own.
"""

import math
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mmscale.report.figure import (
    CHANCE_COLOUR,
    FULL_WIDTH,
    GROUP_COLOURS,
    IMAGE_COLOUR,
    PLAIN_COLOUR,
    TEXT_COLOUR,
    data_uri,
    drawing,
    literal,
    step_axis,
)
from mmscale.report.metrics import Lines, Series, series

PREFIX = "health/"
COLUMNS = 4
PANEL_HEIGHT = 1.9  # inches
LEGEND_HEIGHT = 0.4

_SIDES = ("image", "text")
_WAYS = {"i2t": "image to text", "t2i": "text to image"}
_COLOURS = {
    "image": IMAGE_COLOUR,
    "text": TEXT_COLOUR,
    "matched": IMAGE_COLOUR,
    "unmatched": TEXT_COLOUR,
    "image to text": IMAGE_COLOUR,
    "text to image": TEXT_COLOUR,
    "by image alone": IMAGE_COLOUR,
    "by caption alone": TEXT_COLOUR,
    "vision": IMAGE_COLOUR,
    "plain": CHANCE_COLOUR,
    "floor": CHANCE_COLOUR,
    "centred": PLAIN_COLOUR,
    "loss": PLAIN_COLOUR,
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
    "loss": ("loss of the sample (nats)", "loss"),
    "loss_chance": ("loss of the sample (nats)", "chance"),
    "loss_floor": ("loss of the sample (nats)", "floor"),
    "row_share": ("variance decided", "by image alone"),
    "column_share": ("variance decided", "by caption alone"),
}
_TITLES = {
    "delta": "pairing signal (cosine)",
    "delta_z": "pairing signal (z)",
    "d_prime": "pairing signal (d′)",
    "std_off_sqrt_d": "unmatched std · √d (isotropic 1)",
    "gap": "distance of the two centres",
    "alignment": "mean squared distance of pairs",
    "uniformity": "uniformity (isotropic −4)",
    "twins": "share of rows there twice",
    "hub_skew": "hubness (skewness)",
    "uncovered": "share that is nobody's nearest",
    "hub_share": "queries that find the same one",
    "dims95": "directions of 95 % of the variance",
    "loss_progress": "loss from chance (0) to floor (1)",
    "imbalance": "pull at the image tower / text tower",
    "never_moved": "tensors that never moved",
    "scale_clamped": "share of updates at the scale's limit",
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
# Figures of one kind share a panel, each by what follows the beginning of its name.
_FAMILIES = {
    "grad_norm_": "gradient norm by part",
    "update_": "update as a share of the weights",
    "progress_": "terms from chance (0) to floor (1)",
}
# Constant through a run, or drawn elsewhere: the probe's size, its chance value, the scale.
_NOT_DRAWN = ("pairs", "dims_possible", "logit_scale")
# A group's figures by the beginnings of their names; the first that fits takes a figure.
_GROUPS = {
    "Do pairs stand out": (
        "matched",
        "unmatched",
        "delta",
        "d_prime",
        "auc",
        "accuracy",
        "loss",
        "cka",
        "backbone_cka",
        "std_off",
    ),
    "Room that each side uses": (
        "intra",
        "variance",
        "std",
        "rankme",
        "participation",
        "nesum",
        "dims",
        "knee",
        "condition",
        "slope",
        "uniformity",
    ),
    "How the sides lie to each other": (
        "gap",
        "alignment",
        "row_share",
        "column_share",
        "hub",
        "uncovered",
        "twins",
    ),
    "The same on held-out pairs": ("heldout_",),
    "Features before they are normalised": ("tower_", "head_"),
    "Gradients and updates": (
        "grad_norm_",
        "update_",
        "progress_",
        "imbalance",
        "never_moved",
        "scale_clamped",
    ),
}
_OTHER = "Other figures"

Panels = dict[str, dict[str, Series]]


def draw_health(lines: Lines) -> dict[str, str]:
    """Every `health/*` figure over the run, a picture a group; two sides share a panel."""
    return {group: _draw_group(panels) for group, panels in _grouped(lines).items()}


def _draw_group(panels: Panels) -> str:
    rows = math.ceil(len(panels) / COLUMNS)
    height = PANEL_HEIGHT * rows + LEGEND_HEIGHT
    with drawing(FULL_WIDTH, height, layout=None) as figure:
        grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        figure.subplots_adjust(
            left=0.045,
            right=0.99,
            bottom=0.5 / height,
            top=1 - (LEGEND_HEIGHT + 0.1) / height,
            wspace=0.24,
            hspace=0.62,
        )
        for axes, (title, curves) in zip(grid, panels.items(), strict=False):
            _draw_panel(axes, title, curves)
        for axes in grid[len(panels) :]:
            axes.remove()
        if any(label in _SIDES for curves in panels.values() for label in curves):
            handles = [Line2D([], [], color=_COLOURS[side], label=side) for side in _SIDES]
            figure.legend(handles=handles, loc="upper right", ncols=2)
        return data_uri(figure)


def _draw_panel(axes: Axes, title: str, curves: dict[str, Series]) -> None:
    others = cycle(GROUP_COLOURS)
    for label, curve in curves.items():
        marker = "o" if len(curve.steps) == 1 else None
        colour = _COLOURS.get(label) or (next(others) if label else PLAIN_COLOUR)
        name = literal(label)
        axes.plot(curve.steps, curve.values, color=colour, marker=marker, markersize=3, label=name)
    if any(label and label not in _SIDES for label in curves):
        axes.legend(loc="best", fontsize=7.5)
    if _spans_orders(curves):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    step_axis(axes, num_ticks=4)
    axes.xaxis.label.set_fontsize(8)


def _spans_orders(curves: dict[str, Series]) -> bool:
    """Whether a linear axis would show the largest values only."""
    values = np.concatenate([curve.values for curve in curves.values()])
    return bool(values.min() > 0 and values.max() > 100 * values.min())


def _grouped(lines: Lines) -> dict[str, Panels]:
    """Curves by group, then by panel title, then by label; a lone curve has the label ''."""
    groups: dict[str, Panels] = {group: {} for group in (*_GROUPS, _OTHER)}
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith(PREFIX))
    for key in keys:
        name = key.removeprefix(PREFIX)
        curve = series(lines, key)
        if curve is not None and name not in _NOT_DRAWN:
            title, label = _title_and_label(name)
            groups[_group(name)].setdefault(title, {})[label] = curve
    return {group: panels for group, panels in groups.items() if panels}


def _group(name: str) -> str:
    for group, beginnings in _GROUPS.items():
        if name.startswith(beginnings):
            return group
    return _OTHER


def _title_and_label(name: str) -> tuple[str, str]:
    """`std_image` is the panel `std of a coordinate` and the label `image`."""
    if name in _SHARED_PANELS:
        return _SHARED_PANELS[name]
    for beginning, title in _FAMILIES.items():
        if name.startswith(beginning):
            return title, name.removeprefix(beginning).replace("_", " ")
    if name.startswith("heldout_"):
        return _title_and_label(name.removeprefix("heldout_"))
    base, _, side = name.rpartition("_")
    if base and side in _WAYS:
        return _TITLES.get(base, literal(base.replace("_", " "))), _WAYS[side]
    if side not in _SIDES or not base:
        base, side = name, ""
    return _TITLES.get(base, literal(base.replace("_", " "))), side
