import math
import random

import pytest

from mmscale.report.chance import chance_loss, chance_recall

SETTINGS = {
    "train": {"global_batch_size": 256},
    "loss": {"terms": [{"kind": "infonce", "weight": 0.5}]},
    "negatives": {"gather": True},
}


def test_infonce_at_chance_is_its_weight_times_ln_n():
    assert chance_loss(SETTINGS) == pytest.approx(0.5 * math.log(256))


def test_without_gather_a_rank_contrasts_its_own_rows():
    local = {**SETTINGS, "negatives": {"gather": False}}
    assert chance_loss(local, num_ranks=4) == pytest.approx(0.5 * math.log(64))
    assert chance_loss(local) is None


def test_other_objectives_have_no_chance_line():
    assert chance_loss({**SETTINGS, "loss": {"terms": [{"kind": "other"}]}}) is None
    assert chance_loss({}) is None


def test_chance_recall_is_what_blind_draws_find():
    draws = random.Random(0)
    found = sum(any(item < 5 for item in draws.sample(range(40), 10)) for _ in range(20_000))
    assert chance_recall(10, 40, 5) == pytest.approx(found / 200, abs=1)
    assert chance_recall(1, 500) == pytest.approx(0.2)
    assert chance_recall(10, 5) == pytest.approx(100)
