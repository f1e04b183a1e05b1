"""FSDP2 beyond fp32 and one number of blocks: what stays wide, and what rounding may change."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from mmscale.contracts import World
from mmscale.engine import build
from mmscale.engine.fsdp import FsdpEngine
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.world import join_ranks
from tests.ranks import tiny
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_one_global_batch import assert_same
from tests.ranks.tiny import ROWS, tiny_config, train

BLOCKS = {"model__text__options__layers": 2, "optim__lr": 1e-3}
# Normalised heads, and an image tower with batch normalisation of its own; blocks computed again.
WIDE = {
    "model__head": {"kind": "projector", "hidden": 20, "batch_norm": True},
    "model__logit_scale": {"bias": -10.0},
    "loss__terms": [{"kind": "infonce"}, {"kind": "siglip"}],
}
CONVOLUTIONS = {"name": "timm:mobilenetv3_small_050", "weights": "random"}
CHUNKS = (1, 3)


def _train(cases, always_fsdp=False):
    """Results by case: dtype of products, number of chunks, further settings."""
    if always_fsdp:

        def of_one(kind, model, config, plan, policy, world):
            return FsdpEngine(model, config, policy, world)

        build.build_engine = of_one
    join_ranks(World(), "gloo", 60, alone_too=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    choose, results = tiny.choose, {}
    for name, (dtype, chunks, settings) in cases.items():
        tiny.choose = lambda config, dtype=dtype: replace(choose(config), dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if wide == torch.float64:
            tiny.choose = choose
        micro = ROWS // world // chunks
        steps = 3 if wide == torch.float64 else 1
        results[name] = train(rank, world, "accelerate", micro, steps, BLOCKS | settings, wide)
    return results


SETTINGS: dict[str, Any] = {"plain": {}, "wide": WIDE}
RESHARDED = {"engine__reshard_after_forward": True, "model__vision__checkpointing": True}
EXACT = {chunks: (torch.float64, chunks, RESHARDED) for chunks in CHUNKS}
NARROW: dict[Any, Any] = {
    (name, chunks): (torch.bfloat16, chunks, settings)
    for name, settings in SETTINGS.items()
    for chunks in CHUNKS
}


@pytest.fixture(scope="module")
def joint():
    """One process on the joint batch in one chunk; narrow, as autocast does, and in fp32."""
    found: dict[Any, Any] = {}
    # accelerate has one precision a process.
    for dtype in (torch.float32, torch.bfloat16):
        cases: dict[Any, Any] = {
            ("plain", dtype): (dtype, 1, {}),
            ("wide", dtype): (dtype, 1, WIDE),
        }
        if dtype == torch.float32:
            cases["exact"] = torch.float64, 1, {}
        found |= run_on_ranks(1, _train, cases)[0]
    cases = {(name, FsdpEngine): (torch.bfloat16, 1, s) for name, s in SETTINGS.items()}
    return found | run_on_ranks(1, _train, cases, True)[0]


@pytest.fixture(scope="module")
def ranks():
    return run_on_ranks(2, _train, {**EXACT, **NARROW})


@pytest.mark.parametrize("chunks", CHUNKS)
def test_blocks_gathered_anew_are_exact(joint, ranks, chunks):
    for rank in ranks:
        assert_same(rank[chunks], joint["exact"], 1e-9)


def _error(result, wanted):
    """Length of the gradient's error as a share of the gradient's."""
    names = wanted["gradients"]
    error = [(result["gradients"][n].double() - names[n].double()).norm() for n in names]
    whole = [value.double().norm() for value in names.values()]
    return float(torch.stack(error).norm() / torch.stack(whole).norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_in_bf16_ranks_and_chunks_are_the_joint_batch_within_rounding(joint, ranks, name):
    """The residual stream is bf16 too, so that fp32 is farther away than under autocast alone."""
    exact, cast = joint[name, torch.float32], joint[name, torch.bfloat16]
    whole = joint[name, FsdpEngine]
    print(name, _error(whole, exact), _error(cast, exact))
    assert _error(whole, exact) < 3 * _error(cast, exact)
    for rank in ranks:
        for chunks in CHUNKS:
            result = rank[name, chunks]
            print(name, chunks, _error(result, whole))
            assert _error(result, whole) < 0.5 * _error(whole, exact)
            for got, want in zip(result["records"], exact["records"], strict=True):
                assert got.loss == pytest.approx(want.loss, rel=0.01)
            for held in ("weights", "gradients"):
                assert {value.dtype for value in result[held].values()} == {torch.float32}


def _precisions():
    """Of every parameter while it is whole and of every buffer, and which normalise a batch."""
    join_ranks(World(), "gloo", 60, alone_too=True)
    config = tiny_config(**BLOCKS, **WIDE, model__vision=CONVOLUTIONS)
    policy = replace(choose(config.engine), dtype=torch.bfloat16)
    model, _ = build_model(config.model, None, 0)
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    rank = int(os.environ["RANK"])
    engine = FsdpEngine(model.train(), config, policy, World(rank, 2, rank, "test"))
    for module in engine.module.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    parameters = {name: value.dtype for name, value in engine.module.named_parameters()}
    return norms, parameters, {name: value.dtype for name, value in engine.module.named_buffers()}


def test_in_bf16_scale_bias_and_batch_normalisation_stay_wide():
    norms, parameters, buffers = run_on_ranks(2, _precisions)[0]
    assert len(norms) > 5
    assert torch.bfloat16 not in buffers.values()
    heads = [f"head.{side}.layers.{number}" for side in ("image", "text") for number in (1, 4)]
    wide = {f"{name}.{part}" for name in [*norms, *heads] for part in ("weight", "bias")}
    wide |= {"scale.log_scale", "scale.bias"}
    assert {name for name, dtype in parameters.items() if dtype == torch.float32} == wide
    assert set(parameters.values()) == {torch.float32, torch.bfloat16}
