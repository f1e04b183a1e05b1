"""Matching and classification train on every engine; chunks give the same gradient."""

import os
from typing import Any

import pytest
import torch

from mmscale.checkpoint.state import RunState
from mmscale.contracts import World
from mmscale.loss.objective import Objective
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from mmscale.training.part import Step
from mmscale.training.parts.matching import Matching
from mmscale.training.step import Learner, train_step
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, build_engine, joint_batch, read_gradients, share, tiny_config

FUSION = {"enabled": True, "dim": 16, "heads": 2, "layers": 1, "classes": 3}
TERMS = [{"kind": kind} for kind in ("infonce", "matching", "classification")]
CHUNKS = (1, 3)
UPDATES = 2
NARROW, WIDE = torch.float32, torch.float64


def _train(kind: str, cases: list[tuple[str | None, torch.dtype]], frozen: bool) -> dict[Any, Any]:
    """Records and last gradients, for each file of ZeRO settings, dtype and number of chunks."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    world, results = World(rank, size, rank, "test"), {}
    for file, dtype in cases:
        for chunks in CHUNKS:
            results[file, dtype, chunks] = _updates(kind, file, chunks, dtype, world, frozen)
    return results


def _updates(kind, file, chunks, dtype, world, frozen):
    settings = {"model__fusion": FUSION, "loss": {"terms": TERMS}, "model__text__frozen": frozen}
    rows = ROWS // world.size
    settings["train__micro_batch_size"] = rows // chunks
    config = tiny_config(**settings | ({"engine__deepspeed": file} if file else {}))
    engine, peers = build_engine(config, world, kind, dtype), connect(world)
    parts = [Matching(engine.call, 0, rows // chunks, negatives=True)]
    objective, records, gradients = Objective(config, peers), [], {}
    apply = engine.apply

    def keep_gradients(factor, norm):
        gradients.update(read_gradients(engine, kind))
        apply(factor, norm)

    engine.apply = keep_gradients
    for step in range(UPDATES):
        batch = share(joint_batch(step, dtype), world.rank, world.size)
        learner = Learner(engine, objective, peers, rows // chunks)
        records.append(train_step(learner, batch, Step(RunState(step), 1e-2), parts).record)
    engine.close()
    return records, gradients


@pytest.fixture(scope="module")
def plain():
    """Two ranks without sharding."""
    return run_on_ranks(2, _train, "accelerate", [(None, NARROW), (None, WIDE)], False)


def _assert_same(got, want, tolerance):
    for record, other in zip(got[0], want[0], strict=True):
        assert record.loss == pytest.approx(other.loss, rel=tolerance)
        for name, value in other.terms.items():
            assert record.terms[name] == pytest.approx(value, rel=tolerance), name
    whole = torch.stack([g.double().norm() for g in want[1].values()]).norm()
    assert set(got[1]) == set(want[1])
    for name, gradient in want[1].items():
        error = (got[1][name].double() - gradient.double()).norm() / whole
        assert error < tolerance, f"{name}: {error:.1e}"


def test_chunks_do_not_matter_and_every_part_gets_a_gradient(plain):
    for results in plain:
        records, gradients = results[None, WIDE, 1]
        _assert_same(results[None, WIDE, 3], results[None, WIDE, 1], 1e-9)
        parts = {name.split(".")[0] for name, g in gradients.items() if g.abs().max() > 0}
        assert parts == {"vision", "text", "head", "scale", "fusion"}
        assert records[0].terms["matching"] > 0


@pytest.mark.parametrize("stages", [(3,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_zero_gives_the_same(plain, stages):
    cases = [(f"ds_configs/zero{stage}.json", NARROW) for stage in stages]
    for results in run_on_ranks(2, _train, "deepspeed", cases, False):
        assert len(results) == len(cases) * len(CHUNKS)
        for got in results.values():
            _assert_same(got, plain[0][None, NARROW, 1], 1e-4)


def test_a_frozen_tower_gives_tokens_and_gets_no_gradient():
    (results,) = run_on_ranks(1, _train, "accelerate", [(None, WIDE)], True)
    _assert_same(results[None, WIDE, 3], results[None, WIDE, 1], 1e-9)
    assert not [name for name in results[None, WIDE, 1][1] if name.startswith("text.")]
