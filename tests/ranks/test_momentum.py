"""The momentum encoder is the running mean of the weights, whole or in shards, and is resumed."""

import os
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.files import Checkpoint, step_folder
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import RunState
from mmscale.checkpoint.write import Kept, take_snapshot
from mmscale.config.schema import CheckpointConfig
from mmscale.contracts import Position, World
from mmscale.engine.build import build_engine
from mmscale.engine.ema import averaged, copy_of
from mmscale.engine.plan import plan_batch
from mmscale.loss.objective import Objective
from mmscale.model.batch_norm import connect_batch_norms
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from mmscale.training.part import Step
from mmscale.training.parts.momentum import Momentum
from mmscale.training.step import Learner, train_step
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, joint_batch, share, tiny_config, weights

DECAY, UPDATES, MICRO = 0.9, 3, 2
FSDP, ZERO = "fsdp", (1, 2, 3)


def _settings(stage):
    # The frozen tower and the statistics of the head are part of what is kept or shared.
    settings = {"model__text__frozen": True, "model__head": {"batch_norm": True}}
    return settings | (
        {"engine__deepspeed": f"ds_configs/zero{stage}.json"} if stage in ZERO else {}
    )


class _Run:
    """An engine and what follows it, fresh or from a checkpoint."""

    def __init__(self, stage, world, folder=None):
        self.world, self.config = world, tiny_config(**_settings(stage))
        model, _ = build_model(self.config.model, None, 0 if folder is None else 1)
        checkpoint = None if folder is None else Checkpoint(folder)
        if checkpoint is not None:
            checkpoint.load_weights(model)
        follower = copy_of(model, share_frozen=stage != 3)
        if checkpoint is not None:
            checkpoint.load_momentum(averaged(follower, model))
        connect_batch_norms(model, connect(world))
        policy = choose(self.config.engine)
        self.engine = _engine(model.train(), self.config, stage, policy, world)
        if checkpoint is not None:
            self.engine.restore(checkpoint.moments, checkpoint.state.updates, {})
        shadow = self.engine.shadow(follower)
        self.momentum = Momentum(shadow, policy, DECAY, MICRO, encodes=False)
        self.objective = Objective(self.config, connect(world))

    def update(self, step):
        batch = share(joint_batch(step), self.world.rank, self.world.size)
        rows = ROWS // self.world.size
        learner = Learner(self.engine, self.objective, connect(self.world), rows)
        return train_step(learner, batch, Step(RunState(step), 1e-2), [self.momentum]).record

    def mean(self):
        return {t.name: t.value.detach().clone() for t in self.momentum.tensors()}

    def save(self, folder):
        tensors = [*self.engine.tensors(), *self.momentum.tensors()]
        state = RunState(UPDATES, UPDATES, position=Position(0, UPDATES * ROWS), lanes=4)
        config = self.config.model_dump(mode="json")
        random = {"cpu": torch.get_rng_state()}
        saver = Saver(folder, self.world, CheckpointConfig(), print)
        saver.save(
            take_snapshot(state, {"momentum": {}}, Kept(config), tensors, random, self.world)
        )
        saver.finish()

    def close(self):
        self.momentum.close()
        self.engine.close()


def _engine(model, config, stage, policy, world):
    kind = "deepspeed" if stage in ZERO else "accelerate"
    return build_engine(kind, model, config, plan_batch(config, world.size), policy, world)


def _follow(stages, folder):
    """For each stage: kept and wanted means, the rows they give, and how a resumed run goes on."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    world, results = World(rank, size, rank, "test"), {}
    for stage in stages:
        run = _Run(stage, world)
        wanted = {name: value.double() for name, value in weights(run.engine).items()}
        for step in range(UPDATES):
            run.update(step)
            for name, value in weights(run.engine).items():
                wanted[name] += (1 - DECAY) * (value.double() - wanted[name])
        mean, rows = run.mean(), run.momentum.encode(share(joint_batch(9), rank, size))
        run.save(folder / str(stage))
        run.update(UPDATES)
        after = run.mean()
        run.close()
        resumed = _Run(stage, world, step_folder(folder / str(stage), UPDATES))
        restored = resumed.mean()
        resumed.update(UPDATES)
        results[stage] = (wanted, mean, rows, after, restored, resumed.mean())
        resumed.close()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def followed(folder):
    alone = run_on_ranks(1, _follow, [0], folder)
    ranks = run_on_ranks(2, _follow, [FSDP, *ZERO], folder)
    return {0: [alone[0][0]], **{stage: [r[stage] for r in ranks] for stage in (FSDP, *ZERO)}}


STAGES = pytest.mark.parametrize("stage", [0, FSDP, *ZERO])


@STAGES
def test_it_is_the_mean_of_the_whole_weights(followed, stage):
    start = build_model(tiny_config(**_settings(stage)).model, None, 0)[0].state_dict()
    for wanted, mean, *_ in followed[stage]:
        names = {name.removeprefix("momentum.") for name in mean}
        trained = {n for n in start if not n.startswith("text.") and "attn_mask" not in n}
        assert trained <= names
        moved = 0
        for name in names:
            value = mean[f"momentum.{name}"]
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), wanted[name], rtol=0, atol=1e-6)
            moved += not torch.equal(value, start[name])
        assert moved >= len(trained) - 1
        frozen = {f"momentum.{n}" for n in start if n.startswith("text.trunk.transformer")}
        assert not frozen & set(mean), "frozen weights are not kept twice"


@STAGES
def test_it_encodes_with_its_own_weights_in_evaluation_mode(followed, stage):
    size = len(followed[stage])
    for rank, (_, mean, rows, *_) in enumerate(followed[stage]):
        model, _ = build_model(tiny_config(**_settings(stage)).model, None, 0)
        state = model.state_dict()
        state |= {name.removeprefix("momentum."): value for name, value in mean.items()}
        model.load_state_dict(state)
        batch = share(joint_batch(9), rank, size)
        with torch.no_grad():
            image, text, *_ = model.eval()("both", batch.image, batch.tokens, batch.mask)
        for got, want in zip(rows, (image.unit, text.unit), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
            assert not got.requires_grad


@STAGES
def test_it_is_resumed_exactly(followed, stage):
    for _, mean, _, after, restored, resumed in followed[stage]:
        assert set(mean) == set(restored)
        for name in mean:
            assert torch.equal(restored[name], mean[name]), name
            torch.testing.assert_close(resumed[name], after[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("stage", [FSDP, 3])
def test_another_engine_goes_on_from_what_shards_saved(folder, followed, stage):
    _, mean, *_ = followed[stage][0]
    checkpoint = Checkpoint(step_folder(Path(folder) / str(stage), UPDATES))
    model, _ = build_model(tiny_config(**_settings(0)).model, None, 5)
    checkpoint.load_weights(model)
    follower = copy_of(model, share_frozen=True)
    checkpoint.load_momentum(averaged(follower, model))
    for name, value in averaged(follower, model).items():
        assert torch.equal(value, mean[f"momentum.{name}"]), name
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert {id(p) for p in frozen} <= {id(p) for p in follower.parameters()}
