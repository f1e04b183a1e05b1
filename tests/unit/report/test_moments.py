import pytest

from mmscale.report.space import (
    MOST_SHOWN,
    draw_similarity,
    draw_similarity_over_time,
    draw_spectrum,
    spaced,
)
from tests.unit.report.test_plots import pixels

DRAWERS = [draw_similarity, draw_similarity_over_time, draw_spectrum]


@pytest.fixture
def moments(histograms):
    spectrum = {"ranks": [1, 2, 4, 8], "values": [0.4, 0.2, 0.05, 0.0]}
    return [
        {"step": step, "similarity": histograms, "spectrum": {"image": spectrum, "text": spectrum}}
        for step in range(10, 210, 10)
    ]


@pytest.mark.parametrize("draw", DRAWERS)
def test_a_picture_shows_something(draw, moments):
    assert pixels(draw(moments)).std() > 0
    assert draw([]) is None
    assert draw([{"step": 1}]) is None


def test_hills_are_drawn_in_both_colours(moments):
    for draw in (draw_similarity, draw_similarity_over_time):
        picture = pixels(draw(moments)).astype(int)
        red, blue = picture[..., 0], picture[..., 2]
        assert (blue - red > 100).sum() > 100
        assert (red - blue > 100).sum() > 100


@pytest.mark.parametrize(
    "matched",
    [None, {}, {"edges": [0, 1], "counts": []}, {"edges": [0, 1], "counts": [0]}, "text"],
)
def test_histograms_that_do_not_fit_are_left_out(histograms, matched):
    assert draw_similarity([{"step": 1, "similarity": {"matched": matched}}]) is None
    assert draw_similarity([{"step": 1, "similarity": {**histograms, "matched": matched}}])


@pytest.mark.parametrize(
    "spectrum",
    [3, {"image": 1}, {"ranks": [1], "values": ["x"]}, {"ranks": [1, 2], "values": [0.1]}],
)
def test_spectra_that_do_not_fit_are_left_out(moments, spectrum):
    damaged = {"step": 5, "spectrum": {"image": spectrum, "text": spectrum}}
    assert draw_spectrum([damaged]) is None
    assert draw_spectrum([damaged, *moments]) is not None


def test_of_many_moments_some_are_shown_with_the_first_and_the_last(moments):
    shown = spaced(moments)
    assert len(shown) == MOST_SHOWN
    assert (shown[0], shown[-1]) == (moments[0], moments[-1])
    assert spaced(moments[:3]) == moments[:3]
