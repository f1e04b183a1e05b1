"""A stage change keeps every weight bit for bit, sharded or not; its optimizer is a fresh one."""

import math
import os

import pytest
import torch

from mmscale.checkpoint.state import RunState
from mmscale.config.load import stage_config
from mmscale.contracts import World
from mmscale.engine.build import build_engine
from mmscale.engine.plan import plan_batch
from mmscale.loss.objective import Objective
from mmscale.model.build import build_model
from mmscale.model.freezing import select
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from mmscale.training.part import Step
from mmscale.training.parts.balance import ModalityBalancer
from mmscale.training.step import Learner, train_step
from tests.ranks import tiny
from tests.ranks.launch import run_on_ranks

STAGES = [
    {"name": "heads", "duration": "2 steps", "train": ["head", "scale", "text[-1:]"]},
    {"name": "all", "duration": "2 steps", "optim": {"lr": 1e-3}},
]
# Of two ranks.
FSDP, ZERO = "fsdp", (1, 2, 3)


def _config(stage):
    sharded = {"engine__deepspeed": f"ds_configs/zero{stage}.json"} if stage in ZERO else {}
    return tiny.tiny_config(stages=STAGES, **sharded)


def _engine(run, number, world, sharded, weights=None):
    config = stage_config(run, number)
    # Another seed: every weight must come from the stage before.
    model, _ = build_model(config.model, None, number)
    if weights:
        model.load_state_dict(weights)
    select(model, run, number)
    policy, plan = choose(config.engine), plan_batch(config, world.size)
    kind = "deepspeed" if sharded in ZERO else "accelerate"
    return build_engine(kind, model.train(), config, plan, policy, world), config


def _train(engine, config, world, steps):
    peers = connect(world)
    objective = Objective(config, peers)
    rows = tiny.ROWS // world.size
    for step in steps:
        batch = tiny.share(tiny.joint_batch(step), world.rank, world.size)
        learner = Learner(engine, objective, peers, rows)
        train_step(learner, batch, Step(RunState(step), 1e-2))


def _held(engine):
    """Masters of what is trained and everything else, and the moments, whole."""
    tensors = list(engine.tensors())
    values = {t.name: t.value.detach().cpu().clone() for t in tensors}
    moments = {t.name: {k: v.clone() for k, v in t.moments.items()} for t in tensors}
    return values, moments


def _change_stage(stages):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    world, found = World(rank, size, rank, "test"), {}
    for stage in stages:
        run = _config(stage)
        engine, config = _engine(run, 0, world, stage)
        first, _ = _held(engine)
        _train(engine, config, world, (0, 1))
        before, _ = _held(engine)
        weights = {t.name: t.value.detach().cpu().clone() for t in engine.tensors()}
        engine.close()
        engine, config = _engine(run, 1, world, stage, weights)
        after, moments = _held(engine)
        _train(engine, config, world, (2, 3))
        found[stage] = first, before, after, moments, _held(engine)[0]
        engine.close()
    return found


@pytest.fixture(scope="module")
def changes():
    """First weights, those at the first stage's end, at the second's start, and at its end."""
    alone = run_on_ranks(1, _change_stage, [0])[0]
    return alone | run_on_ranks(2, _change_stage, [FSDP, *ZERO])[0]


@pytest.mark.parametrize("stage", [0, FSDP, *ZERO])
def test_weights_are_bit_equal_over_the_change_and_moments_are_none(changes, stage):
    _, before, after, moments, _ = changes[stage]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not any(moments.values())


@pytest.mark.parametrize("stage", [0, FSDP, *ZERO])
def test_each_stage_moves_what_it_trains_and_nothing_else(changes, stage):
    first, before, after, _, end = changes[stage]
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    assert {name.split(".")[0] for name in moved} == {"head", "scale", "text"}
    assert "text.trunk.token_embedding.weight" not in moved
    moved = {name for name in after if not torch.equal(after[name], end[name])}
    assert "vision.trunk.conv1.weight" in moved
    assert "text.trunk.token_embedding.weight" in moved


@pytest.mark.parametrize("stage", [FSDP, *ZERO])
def test_two_stages_in_shards_end_where_one_device_ends(changes, stage):
    wanted, got = changes[0][-1], changes[stage][-1]
    whole = torch.stack([value.double().norm() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        assert (got[name].double() - value.double()).norm() / whole < 1e-5, name


def _rates_with_balance(stage):
    """Rates that the optimizer really has after an update with one tower slowed down."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    world = World(rank, size, rank, "test")
    engine, config = _engine(_config(stage), 1, world, stage)
    balancer = ModalityBalancer(config.optim.balance, engine, connect(world))
    balancer.load({"balance": math.log(0.25)})
    _train(engine, config, world, (0,))
    inner = engine._zero if stage in ZERO else engine._optimizer
    rates = {group["component"]: group["lr"] for group in inner.param_groups}
    engine.close()
    return rates


@pytest.mark.parametrize("stage", [0, FSDP, 2, 3])
def test_a_slowed_tower_has_its_rate_in_every_engine(stage):
    rates = run_on_ranks(2 if stage else 1, _rates_with_balance, stage)[0]
    assert rates["vision"] == pytest.approx(1e-3 * 0.25)
    assert rates["text"] == rates["head"] == pytest.approx(1e-3)
