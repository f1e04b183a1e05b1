"""Every row of the failure table by its name, and no alarm over healthy spaces.

The generators know nothing of the rules. Run with `-s` to see the confusion matrix.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from mmscale.diagnostics.doctor import diagnose
from mmscale.diagnostics.pairs import Pairs
from tests.unit.diagnostics.faulty_embeddings import (
    MODES,
    few_factors,
    healthy,
    load_features,
    weak,
)

SEEDS = 5
FAILURES = {name: mode for name, mode in MODES.items() if mode[0] != "healthy"}


def share_right(name: str, sizes: list[tuple[int, int]]) -> float:
    """Share of draws that get the mode's verdict; prints its row of the confusion matrix."""
    verdict, make = MODES[name]
    given = Counter(
        diagnose(make(num, width, seed)).verdict for num, width in sizes for seed in range(SEEDS)
    )
    print(f"{name:>32} {verdict:>22}: {dict(given)}")
    return given[verdict] / sum(given.values())


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_named_in_samples_of_128(name):
    assert share_right(name, [(128, 64), (128, 256), (128, 768)]) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_each_failure_is_named_in_samples_of_512(name):
    assert share_right(name, [(512, 64), (512, 256), (512, 768)]) >= 0.95


@pytest.mark.soak
@pytest.mark.parametrize("name", MODES)
def test_each_failure_is_named_in_samples_of_2048(name):
    assert share_right(name, [(2048, 64), (2048, 256), (2048, 768)]) >= 0.95


def draws(make, sizes, seeds):
    return (make(num, width, seed) for num, width in sizes for seed in range(seeds))


SMALL = [(64, 64), (128, 64), (128, 256), (128, 768)]
HEALTHY = {
    "little noise": healthy(0.2),
    "some noise": healthy(0.7),
    "much noise": healthy(1.2),
    "all directions": healthy(0.7, width_share=1.0, cone=0.0),
    "weak": weak,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_alarm_over_healthy_spaces(name):
    """200 draws each, 1,000 in all."""
    given = Counter(diagnose(pairs).verdict for pairs in draws(HEALTHY[name], SMALL, 50))
    print(f"{name:>32} {'healthy':>22}: {dict(given)}")
    assert given["healthy"] >= 0.99 * sum(given.values())


def test_a_model_of_a_world_of_few_factors_is_not_collapsed():
    given = Counter(diagnose(pairs).verdict for pairs in draws(few_factors, [(500, 128)], 40))
    assert given["healthy"] >= 0.95 * sum(given.values()), given


@pytest.mark.parametrize("num", [64, 128, 500])
def test_no_alarm_over_parts_of_trained_clip(real_data, num):
    whole = load_features(real_data, "features_clip.npy")
    given: Counter[str] = Counter()
    for seed in range(1 if num == 500 else 300):
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(500)[:num])
        parts = (whole.image, whole.text, whole.image_ids, whole.text_ids)
        pairs = Pairs(*(part[rows] for part in parts), logit_scale=100.0)
        given[diagnose(pairs).verdict] += 1
    print(f"{f'CLIP, {num} of COCO':>32} {'healthy':>22}: {dict(given)}")
    assert given["healthy"] >= 0.99 * sum(given.values())


@pytest.mark.parametrize("num", [64, 128, 500])
def test_untrained_clip_is_not_healthy(real_data, num):
    whole = load_features(real_data, "features_clip_random.npy")
    for seed in range(20):
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(500)[:num])
        parts = (whole.image, whole.text, whole.image_ids, whole.text_ids)
        assert not diagnose(Pairs(*(part[rows] for part in parts))).healthy
