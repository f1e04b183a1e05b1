"""The picture of `mmscale plan`: efficiency over GPUs, and where a rank's memory goes."""

import math

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from mmscale.engine.forecast import Forecast
from mmscale.engine.memory import TOWER_ACTIVATIONS
from mmscale.engine.wire import GPUS
from mmscale.report.figure import CHANCE_COLOUR, FULL_WIDTH, drawing, png

HEIGHT = 4.2
COLOURS = ("#334155", "#2563eb", "#0d9488", "#ea580c", "#9333ea", "#be123c")
# Kinds of memory that a picture can tell apart.
GROUPS = {
    "weights": "weights",
    "masters": "weights",
    "whole weights": "weights",
    "gathered layer": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buckets": "buckets",
    TOWER_ACTIVATIONS: "activations",
    "head activations": "activations",
    "loss": "activations",
}
OTHER = "queue, momentum encoder"
KINDS = ("weights", "gradients", "optimizer", "buckets", "activations", OTHER)


def draw_forecast(plan: Forecast) -> bytes:
    """The picture as a PNG."""
    with drawing(FULL_WIDTH, HEIGHT) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _efficiency(left, plan)
        _memory(right, plan)
        return png(figure)


def _efficiency(axes: Axes, plan: Forecast) -> None:
    for (name, steps), colour in zip(plan.steps.items(), COLOURS, strict=False):
        style = "-" if name == plan.chosen else "--"
        efficiency = [step.efficiency for step in steps]
        axes.plot(GPUS, efficiency, style, color=colour, marker="o", markersize=4, label=name)
    axes.axvline(plan.cluster.gpus_per_node, color=CHANCE_COLOUR, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(GPUS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lowest = min(step.efficiency for steps in plan.steps.values() for step in steps)
    axes.set_ylim(max(0.0, math.floor(10 * lowest) / 10 - 0.1), 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"GPUs ({plan.cluster.name}; dotted: one node)")
    axes.set_ylabel("predicted efficiency, an upper bound")
    axes.set_title(f"{plan.batch.rank_rows} rows a GPU, {plan.precision}")
    axes.legend(loc="lower left")


def _memory(axes: Axes, plan: Forecast) -> None:
    names = list(plan.memory)
    bottom = [0.0] * len(names)
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        sizes = [
            sum(
                held.bytes / 1e9
                for held in plan.memory[name]
                if not held.host and GROUPS.get(held.name, OTHER) == kind
            )
            for name in names
        ]
        if any(sizes):
            axes.bar(names, sizes, bottom=bottom, color=colour, width=0.6, label=kind)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    room = plan.cluster.memory_gb
    if max(bottom) > room / 2:
        axes.axhline(room, color=CHANCE_COLOUR, linestyle="--", linewidth=1.2)
    axes.set_ylabel("predicted GB a GPU")
    axes.set_title(f"memory of a rank, {plan.batch.world} ranks")
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set_ylim(0, 1.35 * max(bottom))
    axes.legend(loc="upper right", ncols=2)
