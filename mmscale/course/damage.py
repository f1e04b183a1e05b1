"""Samples that could not be decoded: named, and no more of them than allowed."""

from mmscale.assembly import Training
from mmscale.checkpoint.state import Progress
from mmscale.contracts import Batch
from mmscale.dist.peers import from_all
from mmscale.errors import DataError
from mmscale.report.report import Report


def check_damage(training: Training, report: Report, batch: Batch, progress: Progress) -> None:
    """Name what could not be decoded in the global batch. Collective.

    Raises:
        DataError: It is more than `data.max_damaged` of an epoch.
    """
    named = [line for lines in from_all(training.world, batch.damaged) for line in lines]
    for line in named:
        report.warn(f"{line}; its row repeats another sample")
    share, items = training.config.data.max_damaged, training.schedule.items
    if progress.damaged > share * items:
        raise DataError(
            f"{progress.damaged} rows of this epoch could not be decoded, lastly {named[-1]}, more "
            f"than data.max_damaged={share} of {items} allows; run mmscale verify on data.train"
        )
