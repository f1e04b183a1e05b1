"""Objectives through the real engines for ten updates: ranks, chunks and ZeRO stages agree.

The mixture holds every term that needs no other model. Its SigLIP term fades out, so that the
logits' bias has a gradient in the first updates and none in the last ones: ZeRO-3 would add the old
one to nothing. With a queue, its length and what is mined from it change from update to update.
"""

import os
from typing import Any

import pytest
import torch

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_one_global_batch import assert_same
from tests.ranks.tiny import ROWS, train

STEPS = 10
FADING = {"from": 1, "to": 0, "over": "4 steps"}
MIXTURE = [
    {"kind": "infonce", "label_smoothing": {"from": 0.1, "to": 0, "over": "5 steps"}},
    {"kind": "siglip", "weight": FADING},
    {"kind": "dcl", "weight": 0.1},
    {"kind": "ntxent", "weight": 0.1},
    {"kind": "supcon", "weight": 0.1, "base_temperature": 0.1},
    {"kind": "hinge", "hardness": {"from": 0, "to": 1, "over": "8 steps"}},
    {"kind": "hn_nce", "weight": 0.1},
    {"kind": "spectral"},
    {"kind": "vicreg", "weight": 0.04},
    {"kind": "barlow", "weight": 0.01},
    {"kind": "decorrelation", "weight": 0.2},
    {"kind": "alignment", "weight": 0.1},
    {"kind": "uniformity", "weight": 0.1},
    {"kind": "regression", "weight": 0.5},
    {"kind": "diversity", "floor": 1.0},
]
# No multiple of the batch: it wraps within one, and is not full at first.
QUEUE = {
    "queue": {"size": 29, "source": "online", "share": {"from": 0, "to": 1, "over": "5 steps"}},
    "mining": {"kind": "hard", "share": 0.4, "strength": {"from": 0, "to": 1, "over": "8 steps"}},
}
# Terms and a queue that take the momentum encoder's rows; three clusters, made anew twice.
MOMENTUM = [
    {"kind": "infonce"},
    {"kind": "distillation", "alpha": {"from": 0, "to": 0.4, "over": "5 steps"}},
    {"kind": "prototypes", "clusters": [3]},
]
WIDTHS = [{"kind": "infonce"}, {"kind": "matryoshka", "widths": [4, 8], "weights": [0.5, 1]}]
# Both forms, one fading out and one fading in.
TAUGHT = [
    {"kind": "infonce"},
    {"kind": "anchor", "weight": 0.3},
    {"kind": "teacher", "model": "teacher", "weight": FADING | {"start": "3 steps"}},
    {
        "kind": "teacher",
        "model": "teacher",
        "form": "feature",
        "weight": {"from": 0, "to": 1, "over": "4 steps", "start": "2 steps"},
    },
]
# Near the weights of the start, as strongly as the rest of the gradient pulls and clipped with it,
# and near its rows of given pairs in both forms; of no weight in the last updates.
NEAR = [
    {"kind": "infonce"},
    {"kind": "l2_start", "weight": {"from": 0.02, "to": 0, "over": "4 steps", "start": "4 steps"}},
    {"kind": "anchor", "data": "old", "weight": FADING | {"start": "4 steps"}},
    {"kind": "anchor", "data": "old", "form": "affinity", "weight": FADING},
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "infonce": {"loss__terms": [{"kind": "infonce"}]},
    "mixture": {"loss__terms": MIXTURE},
    "mixture and queue": {"loss__terms": MIXTURE, "negatives": QUEUE},
    "momentum and queue": {
        "loss__terms": MOMENTUM,
        "negatives": {"queue": {"size": 29}, "mining": {"kind": "semi_hard", "share": 0.4}},
        "model__momentum": 0.8,
    },
    "widths and queue": {"loss__terms": WIDTHS, "negatives": {"queue": QUEUE["queue"]}},
    "teacher": {"loss__terms": TAUGHT},
    "near the start": {"loss__terms": NEAR},
}
CHUNKS = (1, 3)
BIAS = "scale.bias"


def _settings(name: str, stage: int | None = None) -> dict[str, Any]:
    settings: dict[str, Any] = {**OBJECTIVES[name], "optim__lr": 1e-3}
    if stage is not None:
        settings["engine__deepspeed"] = f"ds_configs/zero{stage}.json"
    return settings


def _run(cases):
    """Every case in these processes: starting them costs more than ten updates."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(rank, world), "gloo", 60, alone_too=True)
    results = {}
    for name, chunks, stage, dtype in cases:
        kind = "accelerate" if stage is None else "deepspeed"
        micro, settings = ROWS // world // chunks, _settings(name, stage)
        results[name, chunks, stage, dtype] = train(
            rank, world, kind, micro, STEPS, settings, dtype
        )
    return results


WIDE = [(name, n, None, torch.float64) for name in OBJECTIVES for n in CHUNKS]
# InfoNCE alone, at every stage and number of chunks: test_one_global_batch.py.
ZERO = [
    ("infonce", 3, 3, torch.float32),
    ("mixture", 1, 1, torch.float32),
    ("mixture", 1, 3, torch.float32),
    ("mixture and queue", 3, 3, torch.float32),
    ("widths and queue", 3, 3, torch.float32),
    ("teacher", 3, 3, torch.float32),
    *(("near the start", 3, stage, torch.float32) for stage in (1, 2, 3)),
    *(("mixture", 3, stage, torch.float32) for stage in (1, 2, 3)),
]
NARROW = [(name, 1, None, torch.float32) for name in {case[0] for case in ZERO}]


@pytest.fixture(scope="module")
def worlds():
    cases = {1: WIDE + NARROW, 2: WIDE + ZERO}
    return {world: run_on_ranks(world, _run, cases[world]) for world in cases}


@pytest.fixture(scope="module")
def four():
    return run_on_ranks(4, _run, WIDE)


def _joint(worlds, name, dtype):
    """One process, one chunk."""
    return worlds[1][0][name, 1, None, dtype]


def test_the_mixture_is_what_it_says(worlds):
    result = _joint(worlds, "mixture", torch.float64)
    assert {term["kind"] for term in MIXTURE} <= set(result["records"][0].terms)
    assert "siglip" in result["records"][3].terms
    assert "siglip" not in result["records"][4].terms
    assert not result["gradients"][BIAS].any()


def test_prototypes_come_with_the_second_epoch(worlds):
    records = _joint(worlds, "momentum and queue", torch.float64)["records"]
    assert ["prototypes" in record.terms for record in records] == [False] * 3 + [True] * 7


def assert_joint(ranks, worlds, name, chunks):
    wanted = _joint(worlds, name, torch.float64)
    terms = wanted["records"][-1].terms
    for results in ranks:
        result = results[name, chunks, None, torch.float64]
        assert_same(result, wanted, 1e-9)
        assert result["records"][-1].terms == pytest.approx(terms, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_accelerate_in_float64(worlds, world, name, chunks):
    assert_joint(worlds[world], worlds, name, chunks)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_accelerate_on_four_ranks_in_float64(worlds, four, name, chunks):
    assert_joint(four, worlds, name, chunks)


@pytest.mark.parametrize(("name", "chunks", "stage"), [case[:3] for case in ZERO])
def test_zero_in_float32(worlds, name, chunks, stage):
    wanted = _joint(worlds, name, torch.float32)
    for results in worlds[2]:
        assert_same(results[name, chunks, stage, torch.float32], wanted, 1e-5)
