"""Weights in bf16 on one device: cast once an update, and the gradient is the same."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.engine.casts import Casts
from mmscale.parallel.device import choose
from tests.ranks import tiny
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, train

CHUNKS = 3
STEPS = 2


class _CountedCasts(TorchDispatchMode):
    """How often a matrix of each shape was cast from fp32, in the order of the program."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        narrow = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        if narrow and args[0].dtype == torch.float32:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **kwargs)


def _updates(chunks: int, keep: bool):
    tiny.choose = lambda config: replace(choose(config), dtype=torch.bfloat16)
    with ExitStack() as stack, _CountedCasts() as counted:
        if not keep:
            stack.enter_context(patch.object(Casts, "begin", lambda self: None))
        result = train(0, 1, "accelerate", ROWS // chunks, STEPS, {})
    return result["gradients"], result["weights"], counted.shapes


@pytest.fixture(scope="module")
def cast():
    """Gradients, weights and casts by number of chunks and whether casts are kept."""
    cases = [(chunks, keep) for chunks in (1, CHUNKS) for keep in (True, False)]
    return {case: run_on_ranks(1, _updates, *case, join=False)[0] for case in cases}


@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_kept_casts_change_no_digit(cast, chunks):
    for kept, anew in zip(cast[chunks, True][:2], cast[chunks, False][:2], strict=True):
        assert kept.keys() == anew.keys()
        assert all(torch.equal(kept[name], anew[name]) for name in kept)


def test_an_update_casts_a_weight_once(cast):
    """Also where a pass without a graph comes first: its casts hand a gradient on."""
    # A matrix of each tower's block, which have the same width.
    shape, blocks = (4 * 32, 32), 2
    for chunks in (1, CHUNKS):
        assert cast[chunks, True][2][shape] == blocks * STEPS
    assert cast[CHUNKS, False][2][shape] == 2 * CHUNKS * blocks * STEPS
