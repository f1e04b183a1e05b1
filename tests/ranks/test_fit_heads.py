"""Heads that are fitted on features are the same on every rank and at every world size."""

import os
from types import SimpleNamespace

import pytest
import torch

from mmscale.contracts import InputSpec, Position, World
from mmscale.engine.before_training import fit_heads
from mmscale.engine.inference import Inference
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, joint_batch, share, tiny_config

BATCHES = 5
HEADS = {
    "apart": {
        "model__head": {"standardize": 50, "whiten": "zca", "init": "pca", "fit_rows": 50},
        "model__head__text": {"kind": "mlp", "init": "autoencoder"},
    },
    "on pairs": {"model__head": {"standardize": 50, "init": "cca", "fit_rows": 50}},
}


class _Stream:
    """A rank's share of a stream's first batches, and nothing after them."""

    schedule = SimpleNamespace(batch_rows=ROWS)

    def __init__(self, world: World):
        self._world = world

    def batches(self, position):
        assert position == Position()
        for seed in range(BATCHES):
            yield share(joint_batch(seed), self._world.rank, self._world.size), position


def _fit(heads: str, micro_rows: int) -> dict[str, torch.Tensor]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    world, config = World(rank, size, rank, "test"), tiny_config(**HEADS[heads])
    model, spec = build_model(config.model, None, 0)
    assert isinstance(spec, InputSpec)
    inference = Inference(model, choose(config.engine))
    fit_heads(model, inference, _Stream(world), connect(world), micro_rows, spec)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("heads", HEADS)
def test_ranks_agree_bit_for_bit_and_with_one_process(heads):
    (alone,) = run_on_ranks(1, _fit, heads, ROWS)
    first, second = run_on_ranks(2, _fit, heads, 2)
    start = build_model(tiny_config(**HEADS[heads]).model, None, 0)[0].state_dict()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name.startswith("head."):
            # 200 steps of Adam carry fp32 noise of the features further than the closed forms do.
            tolerance = 2e-2 if name.startswith("head.text.layers") else 2e-3
            error = (first[name] - value).norm() / value.norm()
            assert error < tolerance, f"{name}: {error:.1e}"
            assert not torch.equal(value, start[name]), f"{name} was not fitted"
        else:
            assert torch.equal(value, start[name])
