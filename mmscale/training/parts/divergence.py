"""A loss that lies above chance, or climbs: the run is halted instead of burning its hours."""

from collections.abc import Mapping

from mmscale.checkpoint.state import RunState
from mmscale.config.training import StopConfig
from mmscale.errors import HaltError
from mmscale.training.part import Part, StepResult

# Updates that a rising loss is averaged over.
RISE_UPDATES = 50


class Divergence(Part):
    """Compares the loss with chance and with its own past; the same on every rank."""

    name = "divergence"

    def __init__(self, config: StopConfig, warmup: int):
        """Take the limits.

        Args:
            config: `stop`.
            warmup: Batches of the stage that do not count.
        """
        self._config, self._warmup = config, warmup
        self._state: dict[str, float] = {}

    def observe(self, result: StepResult, state: RunState) -> None:
        """Raises HaltError where the loss says that this run does not learn."""
        record = result.record
        if state.step - state.stage_start <= self._warmup or not record.applied:
            return
        if self._config.above_chance is not None:
            self._above_chance(_excess(record.terms), self._config.above_chance, state.step)
        if self._config.rise is not None:
            self._rise(record.loss, self._config.rise, state.step)

    def state(self) -> dict[str, float]:
        return dict(self._state)

    def load(self, state: Mapping[str, float]) -> None:
        self._state = dict(state)

    def _above_chance(self, excess: float | None, updates: int, step: int) -> None:
        """Judge a window of updates by those of them whose chance value is known: the logged."""
        count = self._state.get("chance_count", 0)
        known, total = self._state.get("chance_known", count), self._state.get("chance_excess", 0.0)
        count += 1
        if excess is not None:
            known, total = known + 1, total + excess
        if count < updates or not known:
            self._state |= {"chance_count": count, "chance_known": known, "chance_excess": total}
            return
        if total >= 0:
            raise HaltError(
                f"step {step}: over {updates} updates the loss was on average {total / known:.3g} "
                "above what guessing gives; check the pairs (mmscale doctor), lower optim.lr, or "
                "set stop.above_chance=null to go on all the same"
            )
        self._state |= {"chance_count": 0, "chance_known": 0, "chance_excess": 0.0}

    def _rise(self, loss: float, most: float, step: int) -> None:
        count, total = self._state.get("rise_count", 0) + 1, self._state.get("rise_sum", 0.0) + loss
        if count < RISE_UPDATES:
            self._state |= {"rise_count": count, "rise_sum": total}
            return
        mean = total / count
        lowest = min(mean, self._state.get("rise_lowest", mean))
        if lowest > 0 and mean > most * lowest:
            raise HaltError(
                f"step {step}: the loss was {mean:.4g} over {count:.0f} updates, more than "
                f"stop.rise={most:g} times the {lowest:.4g} that it had been; lower optim.lr or "
                "optim.clip_norm"
            )
        self._state |= {"rise_count": 0, "rise_sum": 0.0, "rise_lowest": lowest}


def _excess(terms: Mapping[str, float]) -> float | None:
    """How far the terms whose chance value is known lie above it together; None without any."""
    known = [name for name in terms if f"{name}_chance" in terms]
    if not known:
        return None
    return sum(terms[name] for name in known) - sum(terms[f"{name}_chance"] for name in known)
