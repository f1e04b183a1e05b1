import math
import random

import pytest

from mmscale.config.loss import LossConfig
from mmscale.report.facts import chance_loss, chance_recall


def terms(*entries):
    return LossConfig.model_validate({"terms": entries}).terms


def test_chance_is_the_weighted_sum_of_the_terms():
    infonce = {"kind": "infonce", "weight": 0.5}
    ramp = {"from": 0, "to": 1, "over": "1 epochs"}
    found = {
        "infonce": 3.0,
        "infonce_chance": math.log(256),
        "hinge": 0.2,
        "hinge_chance": 0.4,
        "hinge_weight": 0.25,
    }
    assert chance_loss(terms(infonce), found) == pytest.approx(0.5 * math.log(256))
    both = terms(infonce, {"kind": "hinge", "weight": ramp})
    assert chance_loss(both, found) == pytest.approx(0.5 * math.log(256) + 0.25 * 0.4)


def test_a_term_that_does_not_work_yet_does_not_count():
    both = terms({"kind": "infonce"}, {"kind": "vicreg", "weight": 0})
    assert chance_loss(both, {"infonce": 3.0, "infonce_chance": 2.0}) == 2


def test_without_the_chance_value_of_a_term_there_is_none():
    both = terms({"kind": "infonce"}, {"kind": "vicreg"})
    measured = {"infonce": 3.0, "infonce_chance": 2.0, "vicreg": 1.0}
    assert chance_loss(both, measured) is None


def test_chance_recall_is_what_blind_draws_find():
    draws = random.Random(0)
    found = sum(any(item < 5 for item in draws.sample(range(40), 10)) for _ in range(20_000))
    assert chance_recall(10, 40, 5) == pytest.approx(found / 200, abs=1)
    assert chance_recall(1, 500) == pytest.approx(0.2)
    assert chance_recall(10, 5) == pytest.approx(100)
