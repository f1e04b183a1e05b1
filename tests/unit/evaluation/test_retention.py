"""Figures beside a start, in closed form."""

import pytest
import torch

from mmscale.config.evaluation import RetainConfig
from mmscale.diagnostics.doctor import diagnose
from mmscale.diagnostics.forgetting import Forgetting
from mmscale.evaluation.retention import Point, best_point, same_neighbours
from tests.unit.diagnostics.faulty_embeddings import healthy


def _circle(degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_neighbours_are_counted_one_by_one():
    before = _circle([0.0, 10.0, 90.0, 105.0])
    # The first two keep each other; the third is the nearest of the last no longer.
    after = _circle([0.0, 10.0, 30.0, 105.0])
    assert same_neighbours(before, before, 1) == 1
    # Nearest before: 1, 0, 3, 2; after: 1, 0, 1, 2.
    assert same_neighbours(before, after, 1) == pytest.approx(3 / 4)
    # All others are neighbours of everybody.
    assert same_neighbours(before, after, 10) == 1


def test_turning_a_space_keeps_its_neighbours():
    rows = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.manual_seed(0)), dim=1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.manual_seed(1)))[0]
    assert same_neighbours(rows, rows @ turn) == pytest.approx(1)
    other = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    assert same_neighbours(rows, other) < 0.5


def test_the_best_point_is_the_one_that_gains_most_within_the_budget():
    points = [
        Point(0.0, 0.0, 0.0, {}),
        Point(0.5, 4.0, 1.0, {}),
        Point(0.8, 6.0, 2.5, {}),
        Point(1.0, 5.0, 9.0, {}),
    ]
    assert best_point(points, 2.5).share == 0.8
    assert best_point(points, 1.0).share == 0.5
    assert best_point(points, 0.0).share == 0.0


def _line(now, lost, images=1000):
    return {
        "eval/a/mean": now,
        "eval/a/images": images,
        "retain/a/lost": lost,
        "eval/b/top1": 50.0,
        "eval/b/images": images,
        "retain/b/lost": -1.0,
    }


def test_the_doctor_calls_a_healthy_space_that_lost_more_than_it_may_forgetting():
    pairs = healthy(0.5)(256, 64, 0)
    settings = RetainConfig(sets=("a", "b"), budget=5.0)
    verdicts = {}
    for lost in (-3.0, 1.0, 20.0):
        found = Forgetting.of(_line(60.0, lost), settings)
        assert found.lost == max(lost, -1.0)
        verdicts[lost] = diagnose(pairs, forgetting=found)
    assert [verdicts[lost].verdict for lost in (-3.0, 1.0, 20.0)] == [
        "healthy",
        "healthy",
        "forgetting",
    ]
    assert verdicts[20.0].evidence["points_lost"] == 20
    assert verdicts[20.0].confidence > 0.99
    # A few images do not show a small loss: both evaluations might have drawn it.
    few = Forgetting.of(_line(60.0, 6.0, images=50), settings)
    assert diagnose(pairs, forgetting=few).confidence < 0.6
    assert Forgetting.of({"eval/a/mean": 3.0}, settings) is None
