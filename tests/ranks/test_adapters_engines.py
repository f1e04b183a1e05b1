"""Adapters through the real engines: ranks, chunks and ZeRO stages agree, and nothing else moves.

The towers are OpenCLIP's, whose attention is torch's own layer. With several ranks the kept weights
are whole, or cut into shards that are joined for a pass.
"""

import os
from typing import Any

import pytest
import torch

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_one_global_batch import assert_same
from tests.ranks.tiny import ROWS, build_engine, tiny_config, train, weights

STEPS = 4
LORA = {"kind": "lora", "rank": 2, "alpha": 4}
# All of one tower; of the other one layer, and the block that `frozen` leaves is trained itself.
SETTINGS: dict[str, Any] = {
    "model__vision__adapter": LORA,
    "model__text__adapter": {"kind": "rslora", "rank": 3, "targets": ["attn", "c_fc"]},
    "model__text__options": {
        "width": 32,
        "heads": 2,
        "layers": 2,
        "context_length": 16,
        "vocab_size": 99,
    },
    "model__text__frozen": 1,
}
CHUNKS = (1, 3)
ZERO = [(3, 1), (3, 2), (1, 3), (3, 3)]  # chunks and stage


def _settings(stage: int | None) -> dict[str, Any]:
    deepspeed = {} if stage is None else {"engine__deepspeed": f"ds_configs/zero{stage}.json"}
    return SETTINGS | deepspeed


def _run(cases):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(rank, world), "gloo", 60, alone_too=True)
    results = {}
    for chunks, stage, dtype in cases:
        kind = "accelerate" if stage is None else "deepspeed"
        micro = ROWS // world // chunks
        result = train(rank, world, kind, micro, STEPS, _settings(stage), dtype)
        results[chunks, stage, dtype] = result
    return results


WIDE = [(chunks, None, torch.float64) for chunks in CHUNKS]
NARROW = (1, None, torch.float32)


@pytest.fixture(scope="module")
def worlds():
    zero = [(chunks, stage, torch.float32) for chunks, stage in ZERO]
    cases = {1: [*WIDE, NARROW], 2: [*WIDE, *zero]}
    return {world: run_on_ranks(world, _run, cases[world]) for world in cases}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_in_float64(worlds, world, chunks):
    wanted = worlds[1][0][1, None, torch.float64]
    for results in worlds[world]:
        assert_same(results[chunks, None, torch.float64], wanted, 1e-9)


@pytest.mark.parametrize(("chunks", "stage"), ZERO)
def test_zero_in_float32(worlds, chunks, stage):
    wanted = worlds[1][0][NARROW]
    for results in worlds[2]:
        assert_same(results[chunks, stage, torch.float32], wanted, 1e-5)


def _first(config):
    join_ranks(World(), "gloo", 60, alone_too=True)
    engine = build_engine(config, World(), "accelerate", torch.float64)
    return weights(engine)


@pytest.mark.parametrize("case", ["alone", "two ranks", "zero3"])
def test_only_what_is_asked_for_moves(worlds, case):
    """The adapters, the block left out of them, heads and scale; all else keeps every bit."""
    results = {
        "alone": worlds[1][0][3, None, torch.float64],
        "two ranks": worlds[2][1][3, None, torch.float64],
        "zero3": worlds[2][1][3, 3, torch.float32],
    }[case]
    (first,) = run_on_ranks(1, _first, tiny_config(**SETTINGS))
    same = {n for n, t in results["weights"].items() if torch.equal(t.double(), first[n].double())}
    free = ("head.", "scale.", "text.trunk.transformer.resblocks.1.", "text.trunk.ln_final.")
    wanted = {n for n in first if ".lora_" in n or n.startswith(free)}
    assert set(first) - same == wanted
    assert set(results["gradients"]) == wanted
    stood = {n.rpartition(".lora_")[0] for n in wanted if ".lora_" in n}
    assert len([n for n in stood if n.startswith("vision.")]) == 4
    assert len([n for n in stood if n.startswith("text.")]) == 3
