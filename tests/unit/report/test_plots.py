import base64
import io

import numpy as np
import pytest
from PIL import Image

from mmscale.report.health import draw_health
from mmscale.report.metrics import Series, series, smoothed
from mmscale.report.plots import (
    draw_balance,
    draw_gradient_norms,
    draw_loss,
    draw_recall,
    draw_schedule,
    draw_terms,
)

OF_LINES = {
    "loss": draw_loss,
    "schedule": draw_schedule,
    "recall": draw_recall,
    "terms": draw_terms,
    "gradient norms": draw_gradient_norms,
    "gradient balance": draw_balance,
    "health": lambda lines: next(iter(draw_health(lines).values()), None),
}


def pixels(source):
    head, _, body = source.partition(",")
    assert head == "data:image/png;base64"
    drawn = Image.open(io.BytesIO(base64.b64decode(body)))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn))[..., :3]


@pytest.mark.parametrize("draw", OF_LINES.values(), ids=OF_LINES.keys())
def test_a_picture_shows_something_on_white(draw, run_lines):
    picture = pixels(draw(run_lines))
    assert (picture[0, 0] == 255).all()
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("draw", OF_LINES.values(), ids=OF_LINES.keys())
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"finished": True}],
        [{"step": 1, "loss": None, "lr": "x", "grad_norm_text": None, "health/gap": None}],
    ],
    ids=["no line", "no figure", "no number"],
)
def test_a_plot_without_data_is_none(draw, lines):
    assert draw(lines) is None


@pytest.mark.parametrize("draw", OF_LINES.values(), ids=OF_LINES.keys())
def test_a_plot_of_one_point_is_drawn(draw, run_lines):
    first = [line for line in run_lines if line.get("step") == 10]
    assert pixels(draw(first)).std() > 0


def test_a_tower_without_gradient_leaves_the_other(run_lines):
    frozen = [{**line, "grad_norm_text": 0.0} for line in run_lines if "loss" in line]
    assert pixels(draw_gradient_norms(frozen)).std() > 0
    assert draw_gradient_norms([{"step": 1, "grad_norm_text": 0.0}]) is None


def test_the_balance_is_that_of_the_steps_that_have_both():
    lines = [{"step": step, "grad_norm_vision": 2.0} for step in (1, 2)]
    assert draw_balance(lines) is None
    assert draw_balance([*lines, {"step": 3, "grad_norm_text": 1.0}]) is None
    assert draw_balance([*lines, {"step": 2, "grad_norm_text": 1.0}]) is not None


def test_terms_are_plotted_only_if_there_are_several(run_lines):
    one = [{key: v for key, v in line.items() if "vicreg" not in key} for line in run_lines]
    assert draw_terms(one) is None
    assert draw_terms(run_lines) is not None


def test_a_series_keeps_the_later_of_two_lines_of_a_step():
    curve = series([{"step": 2, "x": 1.0}, {"step": 1, "x": 5.0}, {"step": 2, "x": 3.0}], "x")
    assert curve.steps.tolist() == [1, 2]
    assert curve.values.tolist() == [5, 3]


def test_smoothing_keeps_a_constant_and_calms_noise():
    steps = np.arange(1000.0)
    assert np.allclose(smoothed(Series(steps, np.full(1000, 2.0))).values, 2.0)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(Series(steps, noise)).values[100:].std() < 0.3


def test_health_gives_each_figure_a_panel_in_its_group_and_joins_the_sides():
    assert draw_health([{"step": 1, "health/pairs": 256}]) == {}
    sides = {"health/std_image": 0.1, "health/std_text": 0.2}
    strange = {f"health/figure{n}$_{n}": n for n in range(5)}
    groups = draw_health([{"step": 1, **sides, "health/delta_z": 3.0, **strange}])
    assert list(groups) == ["Do pairs stand out", "Room that each side uses", "Other figures"]
    line = {"health/heldout_auc": 0.9, "health/update_vision": 1e-3, "health/update_text": 0.5}
    assert list(draw_health([{"step": 1, **line}, {"step": 2, **line}])) == [
        "The same on held-out pairs",
        "Gradients and updates",
    ]
    one, five = (pixels(groups[name]).shape[0] for name in list(groups)[1:])
    assert five > 1.5 * one
