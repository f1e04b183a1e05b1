"""A guard that is to halt a run and never could is refused before the first update."""

import pytest

from mmscale.config.training import GuardConfig
from mmscale.training.parts.health import guard_fault
from mmscale.training.stage import Timetable

CONTRACTION = ("complete_collapse", "dead_tower")


def fault(steps=100, every=10, pairs=64, **guard):
    settings = {"action": "halt", "grace": "20 steps"} | guard
    return guard_fault(GuardConfig(**settings), Timetable(25, 64, steps), every, pairs)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({}, None),
        # Probes at 30, 40 and 50 count.
        ({"steps": 50}, None),
        ({"steps": 49}, "guard.grace=20 steps"),
        ({"grace": "4 epochs"}, "guard.grace=4 epochs"),
        ({"grace": "200 steps"}, "guard.grace=200 steps"),
        ({"grace": "200 steps", "verdicts": CONTRACTION}, None),
        ({"pairs": 31}, "31 pairs"),
        ({"pairs": 31, "verdicts": CONTRACTION[:1]}, None),
        ({"every": 40}, "guard.patience=3 probes, one every 40"),
        ({"every": 40, "verdicts": CONTRACTION}, "guard.patience=3 probes, one every 40"),
        ({"every": 40, "patience": 2, "verdicts": CONTRACTION}, None),
        ({"action": "warn", "grace": "200 steps", "pairs": 4}, None),
        ({"action": "off", "every": 1000}, None),
    ],
)
def test_a_guard_that_could_never_halt_is_refused(about, said):
    found = fault(**about)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("guard.action=halt: ")
        assert said in found
