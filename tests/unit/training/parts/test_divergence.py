"""Guards of a loss, on losses made up so that the update at which they speak is known."""

import pytest

from mmscale.checkpoint.state import RunState
from mmscale.config.training import StopConfig
from mmscale.contracts import PARTS, StepRecord
from mmscale.errors import HaltError
from mmscale.training.part import StepResult
from mmscale.training.parts.divergence import RISE_UPDATES, Divergence
from tests.ranks.tiny import joint_batch
from tests.unit.training.rows import loss_input

BATCH, ROWS = joint_batch(), loss_input(2, 3)


def _record(loss: float, chance: float | None = 4.0, applied: bool = True) -> StepRecord:
    terms = {"infonce": loss} | ({} if chance is None else {"infonce_chance": chance})
    return StepRecord(
        loss=loss,
        terms=terms,
        lr=1e-3,
        logit_scale=14.0,
        grad_norm={"total": 1.0},
        grad_norm_parts=dict.fromkeys(PARTS, 1.0),
        keys_digest="0",
        applied=applied,
        damaged=0,
        cut=0,
        tokens=0,
        stop=False,
    )


def _run(config: StopConfig, losses, step: int = 0, state=None, **record) -> dict[str, float]:
    """Losses one after another; returns what the part remembers."""
    part = Divergence(config, warmup=5)
    part.load(state or {})
    for loss in losses:
        step += 1
        part.observe(StepResult(_record(loss, **record), ROWS, BATCH), RunState(step))
    return part.state()


CHANCE = StopConfig(above_chance=10)
RISE = StopConfig(above_chance=None, rise=1.5)


def test_a_mean_above_chance_ends_the_run_after_as_many_updates_as_said():
    _run(CHANCE, [4.1] * 14)
    with pytest.raises(HaltError, match=r"step 15: over 10 updates .* 0\.1 above"):
        _run(CHANCE, [4.1] * 15)


def test_warm_up_and_skipped_updates_do_not_count():
    _run(CHANCE, [9.0] * 5 + [3.9] * 100)
    _run(CHANCE, [9.0] * 100, applied=False)


def test_a_loss_below_chance_goes_on_and_every_window_is_a_new_one():
    _run(CHANCE, [3.9] * 1000)
    with pytest.raises(HaltError, match="step 25"):
        _run(CHANCE, [3.0] * 15 + [4.5] * 10)


def test_terms_without_a_chance_value_are_not_judged():
    _run(CHANCE, [100.0] * 100, chance=None)


def test_updates_without_a_chance_value_count_and_are_not_judged():
    """Only logged updates have one: every fourth, here."""

    def run(losses):
        state = None
        for step, loss in enumerate(losses):
            state = _run(CHANCE, [loss], step, state, chance=None if (step + 1) % 4 else 4.0)

    run([4.1] * 14)
    with pytest.raises(HaltError, match=r"step 15: over 10 updates .* 0\.1 above"):
        run([4.1] * 15)
    run([9.0 if step % 4 else 3.9 for step in range(1, 200)])
    # A window without a logged update lasts until there is one.
    _run(CHANCE, [9.0] * 100, 14, _run(CHANCE, [9.0] * 14, chance=None), chance=None)
    with pytest.raises(HaltError, match="step 41"):
        _run(CHANCE, [9.0], 40, _run(CHANCE, [9.0] * 40, chance=None))


def test_a_rise_over_the_lowest_mean_ends_the_run():
    low, high = [1.0] * (RISE_UPDATES + 5), [1.6] * RISE_UPDATES
    _run(RISE, low + high[:-1])
    with pytest.raises(HaltError, match=r"1\.6 .* more than stop\.rise=1\.5 times the 1 "):
        _run(RISE, low + high)
    _run(RISE, low + [1.4] * 500)


def test_a_guard_goes_on_from_its_state_as_if_never_stopped():
    half = _run(CHANCE, [4.1] * 9)
    with pytest.raises(HaltError, match="step 15"):
        _run(CHANCE, [4.1] * 6, 9, half)
