"""A loss that lies above chance, or climbs: the run is halted instead of burning its hours."""

from collections.abc import Mapping
from dataclasses import replace

from mmscale.checkpoint.state import Progress
from mmscale.config.stopping import StopConfig
from mmscale.contracts import StepRecord
from mmscale.errors import HaltError

# Updates that a rising loss is averaged over.
RISE_UPDATES = 50


def guarded(config: StopConfig, warmup: int, progress: Progress, record: StepRecord) -> Progress:
    """Count an update; the same on every rank.

    Args:
        config: `stop`.
        warmup: Updates of the stage that do not count.
        progress: After the update.
        record: What it measured.

    Raises:
        HaltError: The loss says that this run does not learn.
    """
    if progress.step - progress.stage_start <= warmup or not record.applied:
        return progress
    state = dict(progress.watched)
    if config.above_chance is not None:
        _above_chance(state, _excess(record.terms), config.above_chance, progress.step)
    if config.rise is not None:
        _rise(state, record.loss, config.rise, progress.step)
    return replace(progress, watched=state)


def _above_chance(state: dict[str, float], excess: float | None, updates: int, step: int) -> None:
    """Judge a window of updates by those of them whose chance value is known: that are logged."""
    count = state.get("chance_count", 0)
    known, total = state.get("chance_known", count), state.get("chance_excess", 0.0)
    count += 1
    if excess is not None:
        known, total = known + 1, total + excess
    if count < updates or not known:
        state |= {"chance_count": count, "chance_known": known, "chance_excess": total}
        return
    if total >= 0:
        raise HaltError(
            f"step {step}: over {updates} updates the loss was on average {total / known:.3g} "
            "above what guessing gives; check the pairs (mmscale doctor), lower optim.lr, or set "
            "stop.above_chance=null to go on all the same"
        )
    state |= {"chance_count": 0, "chance_known": 0, "chance_excess": 0.0}


def _rise(state: dict[str, float], loss: float, most: float, step: int) -> None:
    count, total = state.get("rise_count", 0) + 1, state.get("rise_sum", 0.0) + loss
    if count < RISE_UPDATES:
        state |= {"rise_count": count, "rise_sum": total}
        return
    mean = total / count
    lowest = min(mean, state.get("rise_lowest", mean))
    if lowest > 0 and mean > most * lowest:
        raise HaltError(
            f"step {step}: the loss was {mean:.4g} over {count:.0f} updates, more than "
            f"stop.rise={most:g} times the {lowest:.4g} that it had been; lower optim.lr or "
            "optim.clip_norm"
        )
    state |= {"rise_count": 0, "rise_sum": 0.0, "rise_lowest": lowest}


def _excess(terms: Mapping[str, float]) -> float | None:
    """How far the terms whose chance value is known lie above it together; None without any."""
    known = [name for name in terms if f"{name}_chance" in terms]
    if not known:
        return None
    return sum(terms[name] for name in known) - sum(terms[f"{name}_chance"] for name in known)
