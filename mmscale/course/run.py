"""What lasts from a run's start to its end, over all of its segments."""

from collections.abc import Callable
from dataclasses import dataclass

from mmscale.checkpoint.saver import Saver
from mmscale.dist.signals import StopSignal
from mmscale.dist.watchdog import Watchdog
from mmscale.report.report import Report


@dataclass(frozen=True)
class Run:
    """Handed to every segment.

    Attributes:
        report: Takes what is measured and said.
        stop: Whether the run is to end early, and whether wherever it is.
        saver: Writes checkpoints.
        watchdog: Ends the ranks where one stands still.
        updated: Called after each update.
    """

    report: Report
    stop: StopSignal
    saver: Saver
    watchdog: Watchdog
    updated: Callable[[], None]
