"""What DeepSpeed asks of the device in an update: once whether it overflowed, never the time."""

import os
from collections import Counter

import pytest

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, train

STEPS = 4


def _counted(stages):
    """By stage, in `STEPS` updates of 3 chunks: questions for overflow, and waits."""
    join_ranks(World(), "gloo", 60, alone_too=True)
    import deepspeed.runtime.zero.stage3 as three
    import deepspeed.runtime.zero.stage_1_and_2 as two
    import deepspeed.utils.timer as timer

    calls: Counter[str] = Counter()
    for library in (two, three):
        question = library.is_invalid_grad_norm

        def asked(norm, question=question):
            calls["overflow"] += 1
            return question(norm)

        library.is_invalid_grad_norm = asked
    device = timer.get_accelerator()
    wait = device.synchronize

    def waited(*args):
        # Building an engine may wait, its updates may not.
        calls["wait"] += 0 < calls["overflow"] < STEPS
        return wait(*args)

    device.synchronize = waited
    found = {}
    for stage in stages:
        calls.clear()
        settings = {"engine__deepspeed": f"ds_configs/zero{stage}.json"}
        train(0, int(os.environ["WORLD_SIZE"]), "deepspeed", ROWS // 3, STEPS, settings)
        found[stage] = calls["overflow"], calls["wait"]
    return found


@pytest.fixture(scope="module")
def counted():
    return run_on_ranks(1, _counted, (1, 2, 3))[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_update_waits_for_one_answer(counted, stage):
    assert counted[stage] == (STEPS, 0)
