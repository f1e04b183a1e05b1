"""Whole models of Hugging Face's through the real engines: two ranks train what one process does.

Each begins with a logit scale of its own above 100, whose bound is kept among the weights.
"""

import os
from dataclasses import replace

import pytest
import torch

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks import tiny
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_one_global_batch import assert_same
from tests.ranks.tiny import ROWS
from tests.unit.model.whole_hf import SIZE, save_whole

STEPS = 2
SCALE = 4.7  # its log: 110
END = 3  # the token that ends a caption of these models
joint_batch = tiny.joint_batch


def batch_of(seed, dtype=torch.float32):
    """Pictures and tokens as these models want them."""
    batch = joint_batch(seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = 5 + batch.tokens % 17
    tokens[:, -1] = END
    pictures = torch.randn(ROWS, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    return replace(batch, image=pictures, tokens=tokens)


def _run(folder, cases):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_ranks(World(rank, world), "gloo", 60, alone_too=True)
    tiny.joint_batch = batch_of
    results = {}
    for stage, chunks, dtype in cases:
        kind = "accelerate" if stage is None else "deepspeed"
        settings = {"model": {"preset": f"hf:{folder}"}}
        if stage is not None:
            settings["engine__deepspeed"] = f"ds_configs/zero{stage}.json"
        micro = ROWS // world // chunks
        results[stage, chunks, dtype] = tiny.train(rank, world, kind, micro, STEPS, settings, dtype)
    return results


WIDE, NARROW = (None, 1, torch.float64), (None, 1, torch.float32)
SHARED = [WIDE, (None, 3, torch.float64), (1, 1, torch.float32), (3, 3, torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_ranks_train_as_one_process(tmp_path, kind):
    model = save_whole(tmp_path, kind)
    with torch.no_grad():
        model.logit_scale.fill_(SCALE)
    model.save_pretrained(tmp_path)
    (alone,) = run_on_ranks(1, _run, tmp_path, [WIDE, NARROW])
    bound = alone[WIDE]["weights"]["scale.log_bound"]
    torch.testing.assert_close(bound, torch.full_like(bound, SCALE))
    for results in run_on_ranks(2, _run, tmp_path, SHARED):
        for case in SHARED:
            is_wide = case[2] == torch.float64
            assert_same(
                results[case], alone[WIDE if is_wide else NARROW], 1e-9 if is_wide else 1e-5
            )
