"""Activations computed again, and blocks that are frozen, change nothing on any engine."""

import os

import pytest
import torch

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, train

DEEP = {"model__vision__options__layers": 2, "model__text__options__layers": 2}
CHECKPOINTING = {"model__vision__checkpointing": True, "model__text__checkpointing": True}
# A model whose own parameters (CLS token, positions) are read inside a forward of ours.
TIMM = {
    "model__vision__name": "timm:vit_tiny_patch16_224",
    "model__vision__options": {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    },
}
PARTLY = {"model__vision__frozen": 1, "model__text__frozen": -1}


def _rank(kind, settings):
    join_ranks(World(), "gloo", 60, alone_too=True)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return train(rank, size, kind, ROWS // size // 2, 2, settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "towers"), [(2, DEEP), (3, DEEP), (3, {**DEEP, **TIMM})], ids=["2", "3", "3-timm"]
)
def test_checkpointing_and_frozen_blocks_under_zero(stage, towers):
    partly = {**towers, **PARTLY}
    if towers is not DEEP:
        del partly["model__vision__options__layers"]
    zero = {"engine__deepspeed": f"ds_configs/zero{stage}.json", **partly}
    plain = run_on_ranks(1, _rank, "accelerate", partly)[0]
    for result in run_on_ranks(2, _rank, "deepspeed", {**zero, **CHECKPOINTING}):
        for got, wanted in zip(result["records"], plain["records"], strict=True):
            assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert set(result["gradients"]) == set(plain["gradients"])
        assert not any("blocks.0" in name for name in result["gradients"])
        assert any("blocks.1" in name for name in result["gradients"])
        whole = torch.stack([t.norm() for t in plain["weights"].values()]).norm()
        for name, tensor in plain["weights"].items():
            assert (result["weights"][name] - tensor).norm() / whole < 1e-5, name
