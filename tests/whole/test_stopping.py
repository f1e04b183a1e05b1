"""What ends a run before its time: a metric that no longer rises, and a loss above chance."""

import os
import signal

import pytest

from mmscale.data.stream import TrainStream
from mmscale.train import main
from tests.ranks.launch import run_on_ranks
from tests.whole.command import explain, run
from tests.whole.small_run import (
    ALONE,
    checkpoints,
    course,
    metrics,
    succeed,
    words_for,
    write_settings,
)

# Nothing learns at this rate, so no evaluation is better than the first one.
STILL = ["optim.lr=1e-12", "optim.warmup=1 steps", "eval.every=2 steps", "log.every=1 steps"]


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


def test_early_stopping_ends_as_if_complete_and_stays_ended(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, *STILL, "stop.patience=2", f"run.dir={folder}"]
    done = succeed(words)
    # The first evaluation is a best one, the second and third are not.
    assert max(course(folder)) == 6
    assert metrics(folder)[-1]["finished"]
    assert "no eval/mean above" in done.stderr
    assert checkpoints(folder)[-1] == "step-00000006"
    before = course(folder)
    succeed(words)
    assert course(folder) == before, "started again, it does not train on"


def test_a_plateau_halves_the_rate_and_a_stages_patience_begins_the_next(settings, tmp_path):
    folder = tmp_path / "run"
    stages = (
        "stages=[{name: heads, duration: 10 steps, train: [head], patience: 3,"
        " optim: {schedule: plateau, plateau: {patience: 1, factor: 0.5}}},"
        " {name: all, duration: 4 steps}]"
    )
    succeed([*ALONE, *settings, *STILL, stages, "train.duration=14 steps", f"run.dir={folder}"])
    lines = [line for line in metrics(folder) if "loss" in line]
    # Evaluations after 2, 4, 6 and 8 steps; the last three are no better than the first.
    rates = [line["lr"] for line in lines[:8]]
    assert rates == pytest.approx([1e-12] * 4 + [5e-13] * 2 + [2.5e-13] * 2)
    assert [line["grad_norm_vision"] > 0 for line in lines] == [False] * 8 + [True] * (
        len(lines) - 8
    )
    assert len(lines) == 12, "the stage that follows has its own length"


def test_a_loss_above_chance_ends_with_3(settings, tmp_path):
    words = [*ALONE, *settings, *STILL, "stop.above_chance=5", f"run.dir={tmp_path / 'run'}"]
    done = run(words)
    assert done.returncode == 3, explain(done)
    assert "step 6: over 5 updates the loss was on average" in done.stderr
    assert "Traceback" not in done.stderr


def _stopped(words: list[str], step: int) -> int:
    """Exit code of a run that SIGTERM reaches with the batch of `step`."""
    whole = TrainStream.batches

    def batches(self, position):
        for number, found in enumerate(whole(self, position), start=1):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    TrainStream.batches = batches
    return main(words)


def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_goes_on(settings, tmp_path):
    more = ["train.duration=6 steps", "eval.every=2 steps", "checkpoint.best=eval/mean"]
    more.append("data.workers=0")
    straight, folder = tmp_path / "straight", tmp_path / "run"
    succeed([*ALONE, *settings, *more, f"run.dir={straight}"])
    words = [*settings, *more, f"run.dir={folder}"]
    assert run_on_ranks(1, _stopped, words, 4, join=False) == [143]
    assert evaluations(folder).keys() == {2}
    succeed([*ALONE, *words])
    assert evaluations(folder) == evaluations(straight)
    assert evaluations(folder).keys() == {2, 4, 6}


def evaluations(folder):
    """Mean recall by step."""
    return {line["step"]: line["eval/mean"] for line in metrics(folder) if "eval/mean" in line}
