"""Numbers that change in the course of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mmscale.config.load import validate
from mmscale.config.values import Duration, Ramp, whole_steps
from mmscale.errors import ConfigError


def epochs_of_ten(duration: Duration) -> int:
    return duration.steps(10, 8)


def test_a_ramp_is_flat_then_straight_then_flat():
    ramp = Ramp.parse({"from": 1, "to": 3, "over": "2 epochs", "start": "5 steps"})
    found = [ramp.at(step, epochs_of_ten) for step in (0, 5, 6, 15, 25, 26, 1000)]
    assert found == pytest.approx([1, 1, 1.1, 2, 3, 3, 3])


def test_a_ramp_of_no_length_is_a_step():
    ramp = Ramp.parse({"from": 0, "to": 1, "over": "0 steps", "start": "3 steps"})
    assert [ramp.at(step, whole_steps) for step in (2, 3)] == [0, 1]


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(0, 50), st.integers(0, 200))
def test_a_ramp_stays_between_its_ends(first, last, over, step):
    ramp = Ramp(first, last, Duration(over, "steps"))
    low, high = sorted((first, last))
    assert low - 1e-9 <= ramp.at(step, whole_steps) <= high + 1e-9


@pytest.mark.parametrize(
    "written", [0.5, {"from": 0.0, "to": 1.0, "over": "1 epochs", "start": "3 steps"}]
)
def test_a_ramp_is_written_as_it_was_read(written):
    adapter = TypeAdapter(Ramp)
    assert adapter.dump_python(Ramp.parse(written), mode="json") == written


@pytest.mark.parametrize(
    "wrong",
    [
        "much",
        True,
        None,
        [1],
        float("nan"),
        {"from": 0, "to": 1},
        {"from": 0, "to": 1, "over": 5},
        {"from": 0, "to": 1, "over": "5 steps", "end": 3},
        {"from": "x", "to": 1, "over": "5 steps"},
    ],
)
def test_a_ramp_of_anything_but_numbers_is_refused(wrong):
    with pytest.raises(ValueError, match="must be a number"):
        Ramp.parse(wrong)


@pytest.mark.parametrize("alpha", [1.5, {"from": 0, "to": 2, "over": "1 epochs"}])
def test_a_ramp_with_an_end_outside_the_settings_limits_is_refused(alpha):
    settings = {"terms": [{"kind": "distillation", "alpha": alpha}]}
    with pytest.raises(ConfigError, match=r"loss\.terms\.0\.alpha=.* must lie within \[0, 1\]"):
        validate({"data": {"train": "unused"}, "loss": settings})
