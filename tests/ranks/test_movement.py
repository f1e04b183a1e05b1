"""What an update did to the weights: the same figures from every engine, rank count and shard."""

import os

import pytest
import torch.nn.functional as F

from mmscale.checkpoint.state import RunState
from mmscale.contracts import COMPONENTS, World
from mmscale.engine.movement import Movement, trained_names
from mmscale.loss.objective import Objective
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from mmscale.training.part import Step
from mmscale.training.step import Learner, train_step
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import build_engine, joint_batch, share, tiny_config, weights

STEPS = 2
HEAD = "head.image.layers.0"


def _moved(world_size, kind, settings):
    """Ratios of the last update, what stood still, and the same from whole weights."""
    join_ranks(World(), "gloo", 60, alone_too=True)
    world = World(int(os.environ["RANK"]), world_size, 0, "test")
    config = tiny_config(**settings)
    engine = build_engine(config, world, kind)
    peers = connect(world)
    # A part that the loss cannot see: its gradient is zero, and only decay moves it.
    head = engine.module.get_submodule(HEAD)
    head.forward = lambda rows: F.linear(rows, head.weight.detach() + 0 * head.weight)
    objective, names = Objective(config, peers), trained_names(engine)
    for step in range(STEPS):
        movement, before = Movement(engine), weights(engine)
        batch = share(joint_batch(step), world.rank, world_size)
        record = train_step(
            Learner(engine, objective, peers, 99), batch, Step(RunState(step), 1e-2)
        ).record
        moved = movement.since(names, peers)
    after, whole = weights(engine), {}
    for component in COMPONENTS:
        mine = [name for name in names if name.startswith(f"{component}.")]
        if mine:
            step = sum(float((after[n] - before[n]).double().square().sum()) for n in mine)
            size = sum(float(before[n].double().square().sum()) for n in mine)
            whole[component] = (step / size) ** 0.5
    engine.close()
    return moved, whole, record


ENGINES = {
    "one process": (1, "accelerate", {}),
    "two replicas": (2, "accelerate", {}),
    "ZeRO-1": (2, "deepspeed", {"engine__deepspeed": "ds_configs/zero1.json"}),
    "ZeRO-2": (2, "deepspeed", {"engine__deepspeed": "ds_configs/zero2.json"}),
    "ZeRO-3": (2, "deepspeed", {"engine__deepspeed": "ds_configs/zero3.json"}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_tells_how_far_its_weights_moved(name):
    world, kind, settings = ENGINES[name]
    results = run_on_ranks(world, _moved, world, kind, settings)
    for moved, whole, record in results:
        assert moved.shares == pytest.approx(whole, rel=1e-4)
        assert set(moved.shares) == {"vision", "text", "head", "scale"}
        assert moved.still == {f"{HEAD}.weight"}
        parts = record.grad_norm_parts
        for component in COMPONENTS:
            apart = parts[f"{component}_weights"] ** 2 + parts[f"{component}_biases"] ** 2
            assert apart**0.5 == pytest.approx(record.grad_norm[component], rel=1e-6)
        assert parts["vision_weights"] > parts["vision_biases"] > 0
    assert results[0][0] == results[-1][0]
