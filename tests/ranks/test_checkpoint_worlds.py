"""One checkpoint format: what two sharded ranks save, every other engine goes on from exactly."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import RunState
from mmscale.checkpoint.write import Kept, take_snapshot
from mmscale.config.schema import CheckpointConfig
from mmscale.contracts import Position, World
from mmscale.engine.build import build_engine
from mmscale.engine.plan import plan_batch
from mmscale.loss.objective import Objective
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from mmscale.training.part import Step
from mmscale.training.step import Learner, train_step
from tests.ranks import tiny
from tests.ranks.launch import run_on_ranks

UPDATES = 3
FSDP = "fsdp"
# Of two ranks: FSDP2, and ZeRO.
STAGES = (FSDP, 1, 2, 3)


def _config(stage, **settings):
    """Stage 0 is the engine without sharding."""
    is_zero = stage not in (0, FSDP)
    sharded = {"engine__deepspeed": f"ds_configs/zero{stage}.json"} if is_zero else {}
    return tiny.tiny_config(**sharded, **settings)


def _world():
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    return World(rank, size, rank, "test")


def _snapshot(engine):
    """Master weights and moments by name, whole, on the CPU."""
    return {
        f"{kind}/{tensor.name}": value.detach().clone().float()
        for tensor in engine.tensors()
        for kind, value in {"value": tensor.value, **tensor.moments}.items()
    }


def _update(engine, config, world, step):
    objective, peers = Objective(config, connect(world)), connect(world)
    batch = tiny.share(tiny.joint_batch(step), world.rank, world.size)
    learner = Learner(engine, objective, peers, tiny.ROWS // world.size)
    return train_step(learner, batch, Step(RunState(step), 1e-2)).record


def _save_each(folder, stages):
    """For each stage: some updates, a checkpoint, one more update; what was saved, and then."""
    world = _world()
    return {
        stage: _train_and_save(Path(folder, str(stage)), _config(stage), stage, world)
        for stage in stages
    }


def _train_and_save(folder, config, stage, world):
    engine = _engine(build_model(config.model, None, 0)[0], config, stage, world)
    for step in range(UPDATES):
        _update(engine, config, world, step)
    at = RunState(UPDATES, UPDATES, position=Position(0, UPDATES * tiny.ROWS), lanes=4)
    state = _snapshot(engine)
    random = {"cpu": torch.get_rng_state()}
    saver = Saver(folder, world, CheckpointConfig(), print)
    kept = Kept(config.model_dump(mode="json"))
    saver.save(take_snapshot(at, {}, kept, engine.tensors(), random, world))
    # Training goes on while the files are written.
    record = _update(engine, config, world, UPDATES)
    saver.finish()
    after = _snapshot(engine)
    engine.close()
    return state, record.loss, after


def _go_on_from_each(folders, stages):
    """For each checkpoint and stage: the restored state, the next update's loss, the state then."""
    world = _world()
    return {
        (folder.name, stage): _go_on(folder, _config(stage), stage, world)
        for folder in folders
        for stage in stages
    }


def _go_on(folder, config, stage, world):
    checkpoint = Checkpoint(folder / "checkpoints" / f"step-{UPDATES:08d}")
    # Another seed: every weight must come from the checkpoint.
    model, _ = build_model(config.model, None, 1)
    checkpoint.load_weights(model)
    engine = _engine(model, config, stage, world)
    engine.restore(checkpoint.moments, checkpoint.state.updates, {})
    state = _snapshot(engine)
    record = _update(engine, config, world, UPDATES)
    after = _snapshot(engine)
    engine.close()
    return state, record.loss, after


def _engine(model, config, stage, world):
    policy, plan = choose(config.engine), plan_batch(config, world.size)
    kind = "accelerate" if stage in (0, FSDP) else "deepspeed"
    return build_engine(kind, model.train(), config, plan, policy, world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder a checkpoint, named by the stage that saved it; 0: one device."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(folder):
    """What each checkpoint should hold, and how its run went on."""
    alone = run_on_ranks(1, _save_each, folder, [0])[0]
    return alone | run_on_ranks(2, _save_each, folder, STAGES)[0]


@pytest.fixture(scope="module")
def sharded(folder, saved):
    """Two new ranks that go on from each checkpoint with each stage."""
    return run_on_ranks(2, _go_on_from_each, [folder / str(stage) for stage in saved], STAGES)


@pytest.fixture(scope="module")
def alone(folder, saved):
    """One device that goes on from each checkpoint."""
    return run_on_ranks(1, _go_on_from_each, [folder / str(stage) for stage in saved], [0])


def _assert_goes_on(wanted, got):
    (state, loss, after), (got_state, got_loss, got_after) = wanted, got
    trained = {name.removeprefix("exp_avg/") for name in state if name.startswith("exp_avg/")}
    assert {f"value/{name}" for name in trained} == {n for n in state if n.startswith("value/")}
    assert set(got_state) == set(state)
    assert [name for name in state if not torch.equal(got_state[name], state[name])] == []
    assert got_loss == pytest.approx(loss, rel=1e-5)
    whole = torch.stack([value.double().norm() for value in after.values()]).norm()
    for name, value in after.items():
        assert (got_after[name].double() - value.double()).norm() / whole < 1e-5, name


@pytest.mark.parametrize("before", [0, *STAGES])
def test_one_device_goes_on_exactly(saved, alone, before):
    for rank in alone:
        _assert_goes_on(saved[before], rank[str(before), 0])


@pytest.mark.parametrize("before", [0, *STAGES])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_of_every_stage_go_on_exactly(saved, sharded, before, stage):
    for rank in sharded:
        _assert_goes_on(saved[before], rank[str(before), stage])


def test_fsdp_goes_on_bit_for_bit(saved, sharded):
    (_, loss, after), (_, got_loss, got_after) = saved[FSDP], sharded[0][FSDP, FSDP]
    assert got_loss == loss
    assert [name for name in after if not torch.equal(got_after[name], after[name])] == []


def _save_and_go_on(folder, names):
    """For each optimizer and two stages of ZeRO: what was saved, and what another engine makes."""
    world, found = _world(), {}
    for name in names:
        for before, after in ((3, 2), (1, 3), (FSDP, 1), (2, FSDP)):
            settings = {"optim__name": name, "optim__lr": 1e-3}
            place = Path(folder, f"{name}-{before}")
            wanted = _train_and_save(place, _config(before, **settings), before, world)
            found[name, before] = wanted, _go_on(place, _config(after, **settings), after, world)
    return found


def test_other_optimizers_moments_go_on_exactly_under_another_stage(tmp_path):
    for found in run_on_ranks(2, _save_and_go_on, tmp_path, ["lion", "sgd"]):
        for (name, _), ((state, loss, _), (got_state, got_loss, _)) in found.items():
            kind = {"lion": "exp_avg", "sgd": "momentum_buffer"}[name]
            values = {key for key in state if key.startswith("value/")}
            assert set(state) - values == {key.replace("value/", f"{kind}/") for key in values}
            assert set(got_state) == set(state)
            assert [key for key in state if not torch.equal(got_state[key], state[key])] == []
            assert got_loss == pytest.approx(loss, rel=1e-5)


LORA = {"kind": "lora", "rank": 2}
ADAPTERS = {"model__vision__adapter": LORA, "model__text__adapter": LORA, "optim__lr": 1e-3}


def _with_adapters(folder, save):
    """Two ranks of ZeRO-3 save and go on under ZeRO-1; or one device goes on from that."""
    world, config = _world(), partial(_config, **ADAPTERS)
    saved = _train_and_save(folder, config(3), 3, world) if save else None
    after = 1 if save else 0
    return saved, _go_on(folder, config(after), after, world)


def test_a_run_with_adapters_goes_on_exactly_under_another_stage_and_alone(tmp_path):
    wanted, sharded = run_on_ranks(2, _with_adapters, tmp_path, True)[1]
    _, alone = run_on_ranks(1, _with_adapters, tmp_path, False)[0]
    for got in (sharded, alone):
        (state, loss, after), (got_state, got_loss, got_after) = wanted, got
        moments = {name for name in state if name.startswith("exp_avg/")}
        assert any(".lora_A." in name for name in moments)
        assert not any(".base_layer." in name and ".lora_" not in name for name in moments)
        assert [name for name in state if not torch.equal(got_state[name], state[name])] == []
        assert got_loss == pytest.approx(loss, rel=1e-5)
        whole = torch.stack([value.double().norm() for value in after.values()]).norm()
        for name, value in after.items():
            assert (got_after[name].double() - value.double()).norm() / whole < 1e-5, name


def test_adapters_begin_on_the_weights_of_a_run_without(tmp_path):
    run_on_ranks(1, _save_each, tmp_path, [0])
    checkpoint = Checkpoint(tmp_path / "0" / "checkpoints" / f"step-{UPDATES:08d}")
    model, _ = build_model(_config(0, **ADAPTERS).model, None, 1)
    fresh = {name: t.clone() for name, t in model.state_dict().items()}
    checkpoint.load_weights(model)
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            assert torch.equal(tensor, fresh[name]), name
        else:
            theirs = checkpoint.read("value", name.replace(".base_layer", ""))
            assert torch.equal(tensor, theirs), name
