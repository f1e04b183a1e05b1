"""An update whose loss is not finite on one rank is skipped by all, also with a finite gradient."""

import os

import pytest
import torch

from mmscale.checkpoint.state import RunState
from mmscale.contracts import LossOutput, World
from mmscale.loss.objective import Objective
from mmscale.parallel.peers import connect
from mmscale.training.part import Step
from mmscale.training.step import Learner, train_step
from tests.ranks import tiny
from tests.ranks.launch import run_on_ranks

KINDS = {"accelerate": None, "zero1": 1, "zero2": 2, "zero3": 3}


def _train(kind, spoilt):
    """Weights after updates 0 to 2, of which rank 1 spoils the loss of one."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world, stage = World(rank, size, rank, "test"), KINDS[kind]
    settings = {"engine__deepspeed": f"ds_configs/zero{stage}.json"} if stage else {}
    config = tiny.tiny_config(**settings)
    engine = tiny.build_engine(config, world, "deepspeed" if stage else "accelerate")
    peers, objective = connect(world), Objective(config, connect(world))

    def judged(rows):
        found = objective(rows)
        is_spoilt = step == spoilt and rank == 1
        return LossOutput(found.total + float("inf"), found.terms) if is_spoilt else found

    states, applied = [], []
    for step in range(3):
        batch = tiny.share(tiny.joint_batch(step), rank, size)
        micro = tiny.ROWS // size
        done = train_step(Learner(engine, judged, peers, micro), batch, Step(RunState(step), 1e-2))
        states.append(tiny.weights(engine))
        applied.append(done.record.applied)
    engine.close()
    return states, applied


def _both(kind):
    return _train(kind, 1), _train(kind, None)


@pytest.mark.parametrize(
    "kind",
    ["accelerate", "zero2", *[pytest.param(k, marks=pytest.mark.slow) for k in ("zero1", "zero3")]],
)
def test_a_loss_that_is_not_finite_changes_no_weight(kind):
    for (states, applied), (sound, _) in run_on_ranks(2, _both, kind):
        assert applied == [True, False, True]
        for name, value in states[0].items():
            assert torch.equal(states[1][name], value), name
            assert torch.equal(sound[0][name], value), name
        moved = [
            name for name, value in states[1].items() if not torch.equal(states[2][name], value)
        ]
        assert moved, "the update after it is made"
        assert all(value.isfinite().all() for value in states[2].values())
