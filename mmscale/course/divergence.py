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
    if config.above_chance is not None and (known := _against_chance(record.terms)):
        _above_chance(state, *known, config.above_chance, progress.step)
    if config.rise is not None:
        _rise(state, record.loss, config.rise, progress.step)
    return replace(progress, watched=state)


def _above_chance(
    state: dict[str, float], loss: float, chance: float, updates: int, step: int
) -> None:
    count = state.get("chance_count", 0) + 1
    excess = state.get("chance_excess", 0.0) + loss - chance
    if count < updates:
        state |= {"chance_count": count, "chance_excess": excess}
        return
    if excess >= 0:
        raise HaltError(
            f"step {step}: over {updates} updates the loss was on average {excess / updates:.3g} "
            "above what guessing gives; check the pairs (mmscale doctor), lower optim.lr, or set "
            "stop.above_chance=null to go on all the same"
        )
    state |= {"chance_count": 0, "chance_excess": 0.0}


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


def _against_chance(terms: Mapping[str, float]) -> tuple[float, float] | None:
    """Sum of the terms whose chance value is known, and of these values; None without any."""
    known = [name for name in terms if f"{name}_chance" in terms]
    if not known:
        return None
    return sum(terms[name] for name in known), sum(terms[f"{name}_chance"] for name in known)
