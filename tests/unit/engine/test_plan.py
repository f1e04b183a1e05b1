"""Batch arithmetic: what does not divide is refused with the nearest values that do."""

import pytest

from mmscale.config.load import validate
from mmscale.engine.optimizer import rate_factor
from mmscale.engine.plan import plan_batch
from mmscale.errors import ConfigError


def config(total, micro="auto", lanes="auto", captions="random"):
    return validate(
        {
            "data": {"train": "x", "lanes": lanes, "captions": captions},
            "train": {"global_batch_size": total, "micro_batch_size": micro},
        }
    )


def test_arithmetic_is_printed():
    plan = plan_batch(config(2048, 64), 8)
    assert str(plan).startswith("8 ranks x 64 rows x 4 chunks = 2,048 pairs")
    assert plan.lanes == 64


@pytest.mark.parametrize(
    ("settings", "world", "words"),
    [
        ({"total": 1000}, 3, "1000 is not a multiple of 3 ranks; nearest: 999 or 1002"),
        ({"total": 1000, "micro": 64}, 1, "nearest: 960 or 1024"),
        ({"total": 64, "lanes": 5}, 1, "nearest: 4 or 8"),
        ({"total": 64, "lanes": 2}, 4, "multiple of 4 ranks; nearest: 4"),
        ({"total": 64, "captions": 5}, 1, "nearest: 60 or 65"),
    ],
)
def test_what_does_not_divide(settings, world, words):
    with pytest.raises(ConfigError) as caught:
        plan_batch(config(**settings), world)
    assert words in str(caught.value)


def test_lanes_do_not_depend_on_the_world():
    assert {plan_batch(config(256), world).lanes for world in (1, 2, 4, 8, 16, 64)} == {64}
    assert plan_batch(config(256), 128).lanes == 128


def test_rates():
    factors = [rate_factor(step, 10, 4, "cosine") for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[9] == pytest.approx(0.0669873)
    assert rate_factor(7, 10, 4, "linear") == 0.5
    assert rate_factor(9, 10, 0, "constant") == 1.0
    assert rate_factor(0, 2, 100, "cosine") == 0.5, "a warm-up longer than the run is cut to it"
