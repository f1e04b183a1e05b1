"""Runs over one another in one picture, as a PNG or inside a page with the tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mmscale.config.evaluation import MEAN, TOP1, logged
from mmscale.errors import ConfigError
from mmscale.outputs import replace_file
from mmscale.report.compare import (
    Comparison,
    Run,
    SeedGroup,
    comparison_json,
    set_tables,
    setting_table,
    title_of,
)
from mmscale.report.figure import (
    FULL_WIDTH,
    GROUP_COLOURS,
    as_uri,
    drawing,
    literal,
    png,
    step_axis,
)
from mmscale.report.metrics import series, set_figures, smoothed
from mmscale.report.template import write_html

CURVES_HEIGHT = 3.2  # inches
FINAL_HEIGHT = 0.8, 0.34  # inches: the frame, and each group's row
BATCH = "train.global_batch_size"
KINDS = (".html", ".png")


def require_kind(path: Path) -> None:
    """Refuse a file that is neither a page nor a picture.

    Raises:
        ConfigError: Its name ends otherwise.
    """
    if path.suffix not in KINDS:
        raise ConfigError(f"--out {path}: must end with {' or '.join(KINDS)}; rename it")


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the picture (`.png`) or the page (`.html`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = draw_comparison(comparison)
    if path.suffix == ".png":
        replace_file(path, picture)
        return
    write_html(
        path,
        "compare.html",
        names=[run.name for run in comparison.runs],
        sets=set_tables(comparison),
        settings=setting_table(comparison) if comparison.differing else None,
        runs=comparison_json(comparison)["runs"],
        picture=as_uri(picture),
    )


def draw_comparison(comparison: Comparison) -> bytes:
    """Loss and the first set's headline over the runs; by set every run's last beside its group's.

    Returns:
        A PNG.
    """
    groups = comparison.groups
    frame, row = FINAL_HEIGHT
    headlines = _headlines(comparison)
    heights = [CURVES_HEIGHT, *(frame + row * len(groups) for _ in headlines)]
    first, (key, what) = next(iter(headlines.items()))
    with drawing(FULL_WIDTH, sum(heights)) as figure:
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
        curves, finals = parts[0], parts[1:]
        loss, recall = curves.subplots(1, 2)
        by_pairs = len({run.settings.get(BATCH) for run in comparison.runs}) > 1
        for group, colour in _coloured(groups):
            for run in group.runs:
                scale = float(run.settings[BATCH]) if by_pairs else 1.0
                _draw_loss(loss, run, colour, scale)
                _draw_headline(recall, run, (first, key), colour, scale)
        loss.set_ylabel("loss, smoothed (nats)")
        recall.set_ylabel(f"{what} (percent)")
        recall.set_title(literal(title_of(first)) if len(headlines) > 1 else "")
        for axes in (loss, recall):
            step_axis(axes)
            if by_pairs:
                axes.set_xlabel("pairs seen")
        for final, (name, (key, what)) in zip(finals, headlines.items(), strict=True):
            label = f"{literal(title_of(name))}: {what}"
            _draw_final(final.subplots(), groups, key, label)
        return png(figure)


def _headlines(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """What each set is judged by, as it is logged, and in words."""
    words = {MEAN: "mean of the six recalls", TOP1: "top-1 accuracy"}
    return {
        name: (key, words[headline])
        for name, keys in comparison.sets.items()
        for headline in (TOP1, MEAN)
        if (key := logged(name, headline)) in keys or (headline == MEAN and not keys)
    }


def _coloured(groups: Sequence[SeedGroup]) -> list[tuple[SeedGroup, str]]:
    return [(g, GROUP_COLOURS[i % len(GROUP_COLOURS)]) for i, g in enumerate(groups)]


def _draw_loss(axes: Axes, run: Run, colour: str, scale: float) -> None:
    curve = series(run.lines, "loss")
    if curve is not None:
        curve = smoothed(curve)
        axes.plot(curve.steps * scale, curve.values, color=colour, linewidth=1.3)


def _draw_headline(axes: Axes, run: Run, of: tuple[str, str], colour: str, scale: float) -> None:
    name, key = of
    curve = series(
        [{**set_figures(line, name), "step": line.get("step")} for line in run.lines], key
    )
    if curve is not None:
        axes.plot(
            curve.steps * scale, curve.values, color=colour, linewidth=1.3, marker="o", markersize=3
        )


def _draw_final(axes: Axes, groups: Sequence[SeedGroup], key: str, what: str) -> None:
    """A row a group, the first on top; its labels are the legend of the curves."""
    for place, (group, colour) in enumerate(_coloured(groups)):
        values = group.values(key)
        axes.plot(values, np.full(len(values), place), "o", color=colour, alpha=0.55, markersize=5)
        spread = group.spread(key)
        if spread is not None:
            spot, deviation = (spread.mean, place), spread.std or 0.0
            axes.errorbar(*spot, xerr=deviation, color=colour, capsize=4, linewidth=1.5)
            axes.plot(*spot, "|", color=colour, markersize=14, markeredgewidth=2)
            axes.annotate(
                str(spread),
                spot,
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=8,
            )
    axes.set_yticks(range(len(groups)), [group.label for group in groups])
    for label, (_, colour) in zip(axes.get_yticklabels(), _coloured(groups), strict=True):
        label.set_color(colour)
    axes.set_ylim(len(groups) - 0.4, -0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.set_xlabel(f"{what}, last evaluation (percent): runs, mean, deviation")
