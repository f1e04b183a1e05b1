"""Samples that could not be decoded: named, and no more of them than allowed."""

from mmscale.checkpoint.state import RunState
from mmscale.config.data import DataConfig
from mmscale.contracts import World
from mmscale.errors import DataError
from mmscale.parallel.peers import gather_objects
from mmscale.report.report import Report
from mmscale.training.part import Part, StepResult


class Damage(Part):
    """Names what could not be decoded in a global batch, and ends the run where it is too much."""

    name = "damage"

    def __init__(self, config: DataConfig, items: int, world: World, report: Report):
        """Take the limit.

        Args:
            config: `data`.
            items: Turns of samples in an epoch.
            world: All ranks.
            report: Takes the names.
        """
        self._config, self._items = config, items
        self._world, self._report = world, report

    def observe(self, result: StepResult, state: RunState) -> None:
        """Raises DataError where it is more than `data.max_damaged` of an epoch. Collective."""
        if not result.record.damaged:
            return
        named = [
            line for lines in gather_objects(self._world, result.batch.damaged) for line in lines
        ]
        for line in named:
            self._report.warn(f"{line}; its row repeats another sample")
        share = self._config.max_damaged
        if state.damaged > share * self._items:
            raise DataError(
                f"{state.damaged} rows of this epoch could not be decoded, lastly {named[-1]}, "
                f"more than data.max_damaged={share} of {self._items} allows; run mmscale verify "
                "on data.train"
            )
