"""fp16 on every engine: gradients are scaled, measured and clipped unscaled; overflows survived.

A CPU computes in fp16 slowly but rightly; the configuration refuses it there, so the policy is made
by hand.
"""

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmscale.checkpoint.state import RunState
from mmscale.contracts import World
from mmscale.engine.build import build_engine
from mmscale.engine.plan import plan_batch
from mmscale.loss.objective import Objective
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from mmscale.training.part import Step
from mmscale.training.parts.non_finite import lowers_the_scale
from mmscale.training.step import Learner, train_step
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, joint_batch, share, tiny_config, weights

STEPS = 3
# The tiny model's gradients overflow at the usual first scale.
SOUND, TOO_LARGE = 2.0**10, 2.0**24


OFFLOAD = "3_offload"


def _read_as_on_a_gpu():
    """Let DeepSpeed's accessors give copies, as they do where the host's memory is another's."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    for name in ("get_local_fp32_grad_for_param", "get_local_fp32_param"):
        accessor = getattr(Stage3, name)

        def copied(self, *args, accessor=accessor, **words):
            return accessor(self, *args, **words).clone()

        setattr(Stage3, name, copied)


def trained(stage, dtype, first_scale, micro=ROWS // 2):
    """Records and weights after some updates; with `first_scale`, the scale after each.

    Args:
        stage: Of ZeRO, or `OFFLOAD`; 0: FSDP2.
        dtype: Of products.
        first_scale: Factor of the loss to begin with.
        micro: Rows of a chunk, of the six that each of the two ranks has.
    """
    rank = int(os.environ["RANK"])
    world = World(rank, 2, rank, "test")
    # AdamW's first steps follow signs: at a high rate they blow rounding up, whatever scales it.
    zero = {"engine__deepspeed": f"ds_configs/zero{stage}.json"} if stage else {}
    if stage == OFFLOAD:
        _read_as_on_a_gpu()
    config = tiny_config(optim__lr=1e-3, train__micro_batch_size=micro, **zero)
    policy = replace(choose(config.engine), dtype=dtype)
    model, _ = build_model(config.model, None, 0)
    kind, plan = "deepspeed" if stage else "accelerate", plan_batch(config, 2)
    engine: Any = build_engine(kind, model.train(), config, plan, policy, world)
    if first_scale is not None:
        state = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
        state |= {"scale": first_scale, "_growth_tracker": 0}
        engine.restore(lambda name: {}, 0, state)
    peers = connect(world)
    objective = Objective(config, peers)
    records, scales = [], []
    learner = Learner(engine, objective, peers, micro)
    for step in range(STEPS):
        batch = share(joint_batch(step), rank, 2)
        records.append(train_step(learner, batch, Step(RunState(step), 1e-2)).record)
        scales.append(engine.scaler().get("scale"))
    result = records, scales, weights(engine)
    engine.close()
    return result


@pytest.fixture(scope="module")
def unscaled():
    """What all of them should come to: fp32, without chunks and without a scale."""
    return run_on_ranks(2, trained, 0, torch.float32, None)[0]


@pytest.mark.parametrize(
    ("stage", "micro"),
    [
        (0, 2),
        (1, ROWS // 2),
        (2, 2),
        pytest.param(0, ROWS // 2, marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.slow),
        pytest.param(3, ROWS // 2, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.slow),
        (OFFLOAD, 2),
    ],
)
def test_fp16_trains_as_fp32_does(unscaled, stage, micro):
    """With chunks too: what is replayed is made of gradients, which carry the scale already."""
    wide, _, wanted = unscaled
    half, scales, got = run_on_ranks(2, trained, stage, torch.float16, SOUND, micro)[0]
    assert scales == [SOUND] * STEPS
    for ours, theirs in zip(half, wide, strict=True):
        assert ours.applied
        assert ours.loss == pytest.approx(theirs.loss, rel=0.01)
        # Above the limit of clipping: a norm that is still scaled would be 1,024 times this.
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.02)
        assert theirs.grad_norm["total"] > 0.5
    moved = torch.cat([(got[n] - wanted[n]).flatten() for n in wanted]).norm()
    whole = torch.cat([w.flatten() for w in wanted.values()]).norm()
    assert moved < 0.01 * whole


@pytest.mark.parametrize(
    "stage", [2, OFFLOAD, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 3))]
)
def test_an_overflow_lowers_the_scale_and_training_goes_on(stage):
    for records, scales, _ in run_on_ranks(2, trained, stage, torch.float16, TOO_LARGE):
        applied = [record.applied for record in records]
        assert not applied[0], "this scale is beyond fp16"
        wanted = TOO_LARGE
        for was_applied, scale in zip(applied, scales, strict=True):
            wanted = wanted if was_applied else wanted / 2
            assert scale == wanted
        for record, scale in zip(records, scales, strict=True):
            assert record.applied or lowers_the_scale(record.loss, {"scale": scale})


def test_at_a_scale_of_one_a_gradient_that_is_not_finite_is_the_batchs():
    assert not lowers_the_scale(2.5, {"scale": 0.5})
    assert not lowers_the_scale(math.nan, {"scale": 1024.0})
    assert not lowers_the_scale(2.5, {}), "no loss scale at all"
