"""What a run decides survives a stop: interrupted after any update, it ends as the whole run does.

Each life of a run is a process of its own. SIGTERM reaches it when the batch of a given step lies
on the device, so that the checkpoint of that step is the last thing it does.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mmscale.checkpoint.files import step_folders, step_of
from mmscale.contracts import Batch
from tests.ranks.launch import run_on_ranks
from tests.whole.small_run import metrics, write_settings
from tests.whole.stops import live_until

# What an update or a moment costs in time and memory is no decision.
COSTS = ("time", "samples_per_second", "tokens_per_second", "flops", "memory", "data_wait")


@dataclass(frozen=True)
class Case:
    """A run that decides something.

    Attributes:
        words: What it is besides the common words.
        code: Exit code at its end.
        last: The step that it ends after.
        stop: A step in which it is in the middle of deciding.
        spoilt: Steps whose batches hold no numbers.
    """

    words: tuple[str, ...]
    code: int
    last: int
    stop: int
    spoilt: tuple[int, ...] = ()


CASES = {
    # Skipped at 6 and 7, at 8 back to the weights of 4, then skipped twice again.
    "non-finite": Case(
        (
            "train.duration=14 steps",
            "checkpoint.every=4 steps",
            "checkpoint.keep=2",
            "train.non_finite.skips=2",
            "probe.every=4 steps",
            "guard.action=off",
        ),
        0,
        14,
        7,
        (6, 7, 8, 9, 11),
    ),
    # Probed at 3, 6 and 9; halted at the third finding.
    "guard": Case(
        (
            "train.duration=14 steps",
            "checkpoint.every=4 steps",
            "optim.lr=1e-9",
            "probe.every=3 steps",
            "guard.action=halt",
            "guard.grace=1 steps",
            "model.logit_scale={max: 10, course: {from: 5, to: 10, over: 7 steps}}",
        ),
        3,
        9,
        8,
    ),
    # The rate falls after each evaluation without a best, and at the third one the run ends.
    "patience": Case(
        (
            "train.duration=14 steps",
            "checkpoint.every=5 steps",
            "checkpoint.best=eval/mean",
            "optim.lr=1e-9",
            "optim.schedule=plateau",
            "optim.plateau.patience=1",
            "stop.patience=3",
            "stop.metric=eval/mean",
            "eval.every=2 steps",
            "probe.every=4 steps",
            "guard.action=off",
        ),
        0,
        8,
        5,
    ),
}


def life(words: list[str], first: int, stop_at: int | None, spoilt: tuple[int, ...]) -> int:
    """One process of a run: it goes on after step `first`, and is told to stop in `stop_at`."""

    def altered(batch: Batch, step: int) -> Batch:
        bad = float("nan") if step in spoilt else 1.0
        return replace(batch, image=batch.image * bad)

    return live_until(words, first, stop_at, altered)


def live(words: list[str], run_dir: Path, stop_at: int | None, spoilt: tuple[int, ...]) -> int:
    """Exit code of one life."""
    given = [*words, f"run.dir={run_dir}"]
    return run_on_ranks(1, life, given, newest(run_dir), stop_at, spoilt, join=False)[0]


def newest(run_dir: Path) -> int:
    """Step of the newest checkpoint; 0 without any."""
    return next((step_of(folder) for folder in step_folders(run_dir)), 0)


def log(run_dir: Path) -> list[dict]:
    """The whole log, costs left out."""
    return [
        {name: value for name, value in line.items() if not name.startswith(COSTS)}
        for line in metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def common(synthetic, tmp_path_factory) -> list[str]:
    """Words of a run over cached features, whose cache is there."""
    folder = tmp_path_factory.mktemp("common")
    words = [
        str(write_settings(folder)),
        f"data.train={synthetic.train}",
        f"data.eval={synthetic.train}",
        "train.global_batch_size=48",
        "data.workers=0",
        "data.augment=none",
        "model.vision.frozen=true",
        "model.text.frozen=true",
        f"data.feature_cache={folder / 'cache'}",
    ]
    assert live([*words, "train.duration=1 steps"], folder / "run", None, ()) == 0
    return words


@pytest.fixture(scope="module", params=CASES)
def case(request, common, tmp_path_factory) -> tuple[Case, list[str], Path]:
    """A case, its words, and the folder of its run without a stop."""
    case, run_dir = CASES[request.param], tmp_path_factory.mktemp("whole") / "run"
    words = [*common, *case.words]
    assert live(words, run_dir, None, case.spoilt) == case.code
    assert max(line["step"] for line in metrics(run_dir) if "loss" in line) == case.last
    return case, words, run_dir


def test_stopped_while_it_decides_a_run_decides_as_without_a_stop(case, tmp_path):
    case, words, whole = case
    run_dir = tmp_path / "run"
    assert live(words, run_dir, case.stop, case.spoilt) == 143
    assert live(words, run_dir, None, case.spoilt) == case.code
    assert log(run_dir) == log(whole)


@pytest.mark.slow
def test_stopped_after_every_update_a_run_decides_as_without_a_stop(case, tmp_path):
    case, words, whole = case
    run_dir = tmp_path / "run"
    lives, code = 1, live(words, run_dir, 1, case.spoilt)
    while code == 143:
        lives += 1
        assert lives <= case.last, "a life made no step"
        step = newest(run_dir) + 1
        code = live(words, run_dir, step if step < case.last else None, case.spoilt)
    assert code == case.code
    # Told to stop in the update that goes back, it stops after the next.
    assert lives >= case.last - 1
    assert log(run_dir) == log(whole)


@pytest.mark.soak
def test_stopped_after_any_update_a_run_decides_as_without_a_stop(case, tmp_path):
    case, words, whole = case
    for step in range(1, case.last):
        run_dir = tmp_path / f"stopped-{step}"
        assert live(words, run_dir, step, case.spoilt) == 143, step
        assert live(words, run_dir, None, case.spoilt) == case.code
        assert log(run_dir) == log(whole), step
        shutil.rmtree(run_dir)
