"""Design principle 1: ranks x rows x chunks give one process's loss, gradient and weights.

Public trainers miss this: open_clip's default divides the tower gradients by the world size, its
`--local-loss` alone turns their direction, and its accumulation multiplies the scale's gradient.
"""

import pytest
import torch

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, train

STEPS = 3


def _rank(world_size, kind, micro, settings, dtype):
    import os

    join_ranks(World(), "gloo", 60, alone_too=True)
    rank = int(os.environ["RANK"])
    return train(rank, world_size, kind, micro, STEPS, settings, dtype)


def reference(dtype=torch.float32, settings=None):
    """One process on the joint batch, in one chunk."""
    return run_on_ranks(1, _rank, 1, "accelerate", ROWS, settings or {}, dtype)[0]


@pytest.fixture(scope="module")
def joint():
    return reference()


@pytest.fixture(scope="module")
def joint_wide():
    return reference(torch.float64)


def assert_same(result, wanted, tolerance):
    """Every tensor's error is below `tolerance` of the whole gradient's (or weights') norm."""
    for got, want in zip(result["records"], wanted["records"], strict=True):
        assert got.loss == pytest.approx(want.loss, rel=tolerance * 10, abs=0)
        assert got.keys_digest == want.keys_digest
        for part, norm in want.grad_norm.items():
            assert got.grad_norm[part] == pytest.approx(norm, rel=tolerance * 100, abs=1e-12)
    for kind in ("gradients", "weights"):
        whole = torch.stack([t.double().norm() for t in wanted[kind].values()]).norm()
        assert set(result[kind]) == set(wanted[kind])
        for name, tensor in wanted[kind].items():
            error = (result[kind][name].double() - tensor.double()).norm() / whole
            assert error < tolerance, f"{kind} {name}: {error:.1e}"


# No multiple of the batch: it wraps within one, and is not full at first.
QUEUE = {"negatives__queue": {"size": 29, "source": "online"}}


@pytest.fixture(scope="module")
def queued_wide():
    return reference(torch.float64, QUEUE)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_queue_in_float64(queued_wide, joint_wide, world, chunks):
    assert queued_wide["records"][-1].loss != pytest.approx(joint_wide["records"][-1].loss)
    micro = ROWS // world // chunks
    for result in run_on_ranks(world, _rank, world, "accelerate", micro, QUEUE, torch.float64):
        assert_same(result, queued_wide, 1e-9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_queue_under_zero_in_float32(stage):
    settings = QUEUE | {"engine__deepspeed": f"ds_configs/zero{stage}.json"}
    joint = reference(settings=QUEUE)
    for result in run_on_ranks(2, _rank, 2, "deepspeed", ROWS // 6, settings, torch.float32):
        assert_same(result, joint, 1e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 3])
def test_accelerate_in_float64(joint_wide, world, chunks):
    results = run_on_ranks(
        world, _rank, world, "accelerate", ROWS // world // chunks, {}, torch.float64
    )
    for result in results:
        assert_same(result, joint_wide, 1e-9)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 3])
def test_zero_in_float32(joint, stage, chunks):
    settings = {"engine__deepspeed": f"ds_configs/zero{stage}.json"}
    micro = ROWS // 2 // chunks
    for result in run_on_ranks(2, _rank, 2, "deepspeed", micro, settings, torch.float32):
        assert_same(result, joint, 1e-5)


def test_without_gathering_the_result_is_another(joint_wide):
    """The proof above can fail: a batch cut without `negatives.gather` has another gradient."""
    settings = {"negatives__gather": False}
    result = run_on_ranks(2, _rank, 2, "accelerate", ROWS // 2, settings, torch.float64)[0]
    with pytest.raises(AssertionError):
        assert_same(result, joint_wide, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 3])
def test_zero3_offload_in_float32(joint, chunks):
    """DeepSpeed 0.19.8 loses a head's gradient on its way to the host unless told otherwise."""
    settings = {"engine__deepspeed": "ds_configs/zero3_offload.json"}
    micro = ROWS // 2 // chunks
    for result in run_on_ranks(2, _rank, 2, "deepspeed", micro, settings, torch.float32):
        assert_same(result, joint, 1e-5)
