"""A rank that fails in mid-run ends all of them, each with the cause, instead of a wait for it."""

import os
import signal
import sys
import time

import pytest

from mmscale.checkpoint.state import RunState
from mmscale.contracts import World
from mmscale.errors import DataError, explained
from mmscale.loss.objective import Objective
from mmscale.parallel.failure import failing_together
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from mmscale.training.part import Step
from mmscale.training.step import Learner, train_step
from tests.ranks.launch import start_ranks
from tests.ranks.tiny import ROWS, build_engine, joint_batch, share, tiny_config

CAUSE = "shard-000003.tar: cannot be read; restore the shard"
SECONDS = 30.0
# Engine, ZeRO stage, the rank that fails; each costs the start of two processes.
CASES = [
    ("accelerate", None, 1),
    ("deepspeed", 3, 0),
    *[
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("accelerate", None, 0), ("deepspeed", 2, 1))
    ],
    *[
        pytest.param(*case, marks=pytest.mark.soak)
        for case in (("deepspeed", 3, 1), ("deepspeed", 2, 0))
    ],
]


def _train_until(kind: str, stage: str, failing: int, how: str) -> int:
    """A rank's whole life: joined, some updates, and on one rank an end that nobody expects."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, rank, "test")
    settings = {"engine__deepspeed": f"ds_configs/zero{stage}.json"} if kind == "deepspeed" else {}
    with failing_together(world):
        join_ranks(world, "gloo", 600)
        config = tiny_config(**settings)
        engine = build_engine(config, world, kind)
        peers = connect(world)
        objective = Objective(config, peers)
        step = 0
        while True:
            if step == 2 and rank == failing:
                print("fails now", flush=True)
                _fail(how)
            batch = share(joint_batch(step), rank, size)
            train_step(
                Learner(engine, objective, peers, ROWS // size), batch, Step(RunState(0), 1e-2)
            )
            step += 1


def _fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupted":
        raise KeyboardInterrupt
    if how == "bug":
        raise ZeroDivisionError("a fault of our own")
    raise DataError(CAUSE)


def _ends(kind: str, stage: int | None, failing: int, how: str) -> list[tuple[int, str]]:
    """Exit code and stderr of two ranks started by hand, within the time that they have."""
    call = f"main({kind!r}, {stage!r}, {failing}, {how!r})"
    program = f"from tests.ranks.test_failing_together import main; {call}"
    ranks = start_ranks(program, 2)
    try:
        ranks[failing].stdout.readline()
        deadline = time.monotonic() + SECONDS
        told = [p.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for p in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(ranks, told, strict=True)]


def main(kind: str, stage: int | None, failing: int, how: str) -> None:
    """The program of a rank."""
    sys.exit(explained(lambda: _train_until(kind, str(stage), failing, how)))


@pytest.mark.parametrize(("kind", "stage", "failing"), CASES)
def test_both_ranks_end_with_the_code_and_the_words_of_the_one_that_failed(kind, stage, failing):
    ends = _ends(kind, stage, failing, "data")
    for rank, (code, told) in enumerate(ends):
        assert code == DataError.exit_code, f"rank {rank}: {code}\n{told}"
        assert "Traceback" not in told, told
        assert CAUSE in told
    assert f"rank {failing} failed: " in ends[1 - failing][1]
    assert f"rank {failing} failed: " not in ends[failing][1]


@pytest.mark.parametrize(("kind", "stage", "failing"), CASES)
def test_a_killed_rank_ends_the_other_as_a_failed_launch(kind, stage, failing):
    ends = _ends(kind, stage, failing, "killed")
    assert ends[failing][0] == -signal.SIGKILL
    code, told = ends[1 - failing]
    assert code == 6, f"{code}\n{told}"
    assert "Traceback" not in told, told


@pytest.mark.slow
def test_an_interrupted_rank_ends_the_other_with_130():
    ends = _ends("accelerate", None, 1, "interrupted")
    assert [code for code, _ in ends] == [130, 130], ends


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_is_named_on_the_other_rank():
    ends = _ends("accelerate", None, 1, "bug")
    assert [code for code, _ in ends] == [1, 1], ends
    assert "Traceback" in ends[1][1]
    assert "rank 1 failed: ZeroDivisionError: a fault of our own" in ends[0][1]
