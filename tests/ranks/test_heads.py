"""Batch normalisation in the heads: ranks and chunks give one process's statistics and gradient."""

import os

import pytest
import torch

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_one_global_batch import assert_same
from tests.ranks.tiny import ROWS, train

STEPS = 3
CHUNKS = (1, 3)
NARROW, WIDE = torch.float32, torch.float64
# Image side: one normalisation; text side: two.
HEADS = {
    "model__head": {"kind": "projector", "hidden": 20, "batch_norm": True},
    "model__head__image": {"kind": "linear"},
}


def _rank(world_size, kind, cases):
    """One result a file of ZeRO settings (None: no sharding), dtype and number of chunks."""
    join_ranks(World(), "gloo", 60, alone_too=True)
    rank = int(os.environ["RANK"])
    return {
        (file, dtype, chunks): train(
            rank,
            world_size,
            kind,
            ROWS // world_size // chunks,
            STEPS,
            HEADS | ({"engine__deepspeed": file} if file else {}),
            dtype,
        )
        for file, dtype in cases
        for chunks in CHUNKS
    }


@pytest.fixture(scope="module")
def joint():
    return run_on_ranks(1, _rank, 1, "accelerate", [(None, WIDE), (None, NARROW)])[0]


def _assert_same(result, wanted, tolerance):
    assert_same(result, wanted, tolerance)
    statistics = {name: t for name, t in wanted["weights"].items() if "running_" in name}
    assert len(statistics) == 2 * 3
    for name, value in statistics.items():
        got = result["weights"][name].to(value)
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance)
        assert not torch.equal(value, torch.full_like(value, float("var" in name))), name


def test_chunks_do_not_matter(joint):
    _assert_same(joint[None, WIDE, 3], joint[None, WIDE, 1], 1e-9)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_and_chunks_do_not_matter(joint, world):
    for results in run_on_ranks(world, _rank, world, "accelerate", [(None, WIDE)]):
        for result in results.values():
            _assert_same(result, joint[None, WIDE, 1], 1e-9)


@pytest.mark.parametrize("stages", [(3,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_zero_gives_the_same(joint, stages):
    cases = [(f"ds_configs/zero{stage}.json", NARROW) for stage in stages]
    for results in run_on_ranks(2, _rank, 2, "deepspeed", cases):
        assert len(results) == len(cases) * len(CHUNKS)
        for result in results.values():
            # Twelve rows divided by their own deviation: fp32 noise grows more than without.
            _assert_same(result, joint[None, NARROW, 1], 2e-4)
