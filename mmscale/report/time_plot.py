"""Where the time of updates goes, as a picture."""

import numpy as np
from matplotlib.ticker import PercentFormatter

from mmscale.parallel.phases import PHASES
from mmscale.report.figure import FULL_WIDTH, data_uri, drawing, step_axis
from mmscale.report.series import Lines, series, smoothed

COLOURS = {
    "data": "#94a3b8",
    "forward": "#2563eb",
    "loss": "#0d9488",
    "backward": "#1e3a8a",
    "communication": "#ea580c",
    "optimizer": "#9333ea",
    "other": "#e2e8f0",
}
ORDER = ("data", *PHASES, "other")


def draw_time(lines: Lines) -> str | None:
    """Share of each phase over the run; None where no line has them."""
    curves = {name: series(lines, f"time/{name}") for name in ORDER}
    found = {name: smoothed(curve) for name, curve in curves.items() if curve is not None}
    if len(found) < len(ORDER):
        return None
    steps = found["data"].steps
    seconds = np.stack([found[name].values for name in ORDER])
    with drawing(FULL_WIDTH, 2.4) as figure:
        axes = figure.subplots()
        axes.stackplot(
            steps,
            100 * seconds / seconds.sum(0),
            labels=ORDER,
            colors=[COLOURS[name] for name in ORDER],
        )
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(PercentFormatter())
        axes.set_ylabel("share of an update")
        step_axis(axes)
        axes.margins(x=0)
        figure.legend(loc="outside right center")
        return data_uri(figure)
