import math
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from mmscale.diagnostics.geometry import PROBE_ROWS, health_figures, loss_floor
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.spectrum import isotropic_rankme, tower_figures
from mmscale.errors import DataError
from tests.unit.diagnostics.faulty_embeddings import (
    as_pairs,
    dead,
    healthy,
    isotropic,
    joint_collapse,
    load_features,
)

# 500 COCO pairs of a trained and of an untrained CLIP, measured once by other code (uniformity,
# CKA's z and the second hub direction, which it lacked, by this one).
REAL = {
    "features_clip.npy": {
        "intra_image": 0.5315,
        "intra_text": 0.5152,
        "uniformity_image": -1.7945,
        "uniformity_text": -1.8409,
        "hub_skew_i2t": 1.646,
        "uncovered_i2t": 0.346,
        "cka": 0.6046,
        "cka_z": 213.1,
        "matched": 0.3099,
        "unmatched": 0.1616,
        "delta": 0.1483,
        "delta_z": 79.2,
        "std_off_sqrt_d": 1.092,
        "auc": 0.9886,
        "d_prime": 3.609,
        "accuracy_i2t": 0.552,
        "accuracy_t2i": 0.506,
        "gap": 0.8514,
        "rankme_image": 258.22,
        "rankme_text": 243.76,
        "participation_image": 42.70,
        "participation_text": 41.71,
        "nesum_image": 10.33,
        "nesum_text": 10.07,
    },
    "features_clip_random.npy": {
        "intra_image": 0.6814,
        "intra_text": 0.6635,
        "uniformity_image": -0.9099,
        "uniformity_text": -1.308,
        "hub_skew_i2t": 6.369,
        "uncovered_i2t": 0.976,
        "cka": 0.02571,
        "cka_z": 9.062,
        "matched": 0.02853,
        "unmatched": 0.02778,
        "delta": 0.0007487,
        "delta_z": 1.129,
        "std_off_sqrt_d": 0.6063,
        "auc": 0.5089,
        "d_prime": 0.0282,
        "accuracy_i2t": 0.002,
        "accuracy_t2i": 0.002,
        "gap": 1.1361,
        "rankme_image": 37.35,
        "rankme_text": 194.71,
        "participation_image": 2.194,
        "participation_text": 48.40,
        "nesum_image": 1.585,
        "nesum_text": 13.224,
    },
}


@pytest.mark.parametrize("name", REAL)
def test_figures_of_real_features_are_the_recorded_ones(real_data, name):
    pairs = load_features(real_data, name)
    figures = health_figures(pairs) | pairing_figures(pairs)
    for key, expected in REAL[name].items():
        digits = max(3, len(str(expected).lstrip("-0.").replace(".", "")))
        assert figures[f"health/{key}"] == pytest.approx(expected, rel=0.6 * 10 ** (1 - digits)), (
            key
        )


@pytest.mark.parametrize(
    ("scale", "loss"), [(1, 6.06762), (1 / 0.07, 4.34017), (100, 1.80089)], ids=str
)
def test_health_loss_of_real_features_is_the_recorded_one(real_data, scale, loss):
    pairs = replace(load_features(real_data, "features_clip.npy"), logit_scale=float(scale))
    figures = health_figures(pairs)
    assert figures["health/loss"] == pytest.approx(loss, abs=2e-5)
    assert figures["health/loss_chance"] == pytest.approx(6.2146, abs=1e-4)


def test_loss_floor_is_that_of_a_simplex_of_unit_rows():
    assert loss_floor(128, 1.0) == pytest.approx(3.858, abs=5e-4)
    assert loss_floor(128, 1 / 0.07) == pytest.approx(7e-5, rel=0.05)


def test_tower_figures_of_a_fixed_matrix_are_the_recorded_ones():
    i, j = (torch.arange(n, dtype=torch.float64) for n in (8, 6))
    i, j = i[:, None], j[None, :]
    raw = torch.sin(0.7 * i + 0.3 * j + 0.1 * i * j)
    image, text = normalize(raw), normalize(torch.cos(0.5 * i + 0.2 * j) + 0.5 * raw)
    figures = tower_figures(image)
    assert figures["rankme"] == pytest.approx(3.463281068069, rel=1e-9)
    assert figures["participation"] == pytest.approx(2.462606669370, rel=1e-11)
    assert figures["nesum"] == pytest.approx(2.066138367791, rel=1e-11)
    assert figures["std"] == pytest.approx(0.430077124226, rel=1e-11)
    gap = health_figures(Pairs(image, text, torch.arange(8), torch.arange(8)))["health/gap"]
    assert gap == pytest.approx(0.426790128390, rel=1e-11)


def test_figures_against_loops():
    pairs = healthy(0.7)(40, 16, 0)
    similarity = (pairs.image.double() @ pairs.text.double().T).tolist()
    cells = [(i, j) for i in range(40) for j in range(40) if i != j]
    diagonal = [similarity[i][i] for i in range(40)]
    off = [similarity[i][j] for i, j in cells]
    figures = health_figures(pairs)
    won = sum((d > o) + 0.5 * (d == o) for d in diagonal for o in off) / (len(off) * 40)
    assert figures["health/auc"] == pytest.approx(won, abs=1e-12)
    mean = sum(off) / len(off)
    deviation = math.sqrt(sum((o - mean) ** 2 for o in off) / len(off))
    assert figures["health/std_off_sqrt_d"] == pytest.approx(deviation * 4, rel=1e-6)
    best = sum(
        all(similarity[i][i] > similarity[i][j] for j in range(40) if j != i) for i in range(40)
    )
    assert figures["health/accuracy_i2t"] == pytest.approx(best / 40)
    x = pairs.image.double()
    intra = sum(float(x[i] @ x[j]) for i, j in cells) / len(cells)
    assert figures["health/intra_image"] == pytest.approx(intra, abs=1e-7)


def test_delta_z_is_that_of_drawn_permutations():
    pairs = healthy(1.2)(60, 32, 1)
    similarity = pairs.image.double() @ pairs.text.double().T
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [
            similarity[torch.arange(60), torch.randperm(60, generator=generator)].mean()
            for _ in range(4000)
        ]
    )
    expected = float((similarity.diagonal().mean() - drawn.mean()) / drawn.std())
    assert health_figures(pairs)["health/delta_z"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("num", "expected"), [(256, 244), (768, 619), (2048, 728), (4096, 749), (25600, 765)]
)
def test_rankme_of_isotropic_rows_follows_marchenko_pastur(num, expected):
    assert isotropic_rankme(num, 768) == pytest.approx(expected, abs=1)


def test_isotropic_rows_reach_their_baselines():
    figures = health_figures(isotropic(512, 256, 0))
    assert figures["health/rankme_ratio_image"] == pytest.approx(1, abs=0.01)
    assert figures["health/participation_text"] == pytest.approx(512 * 256 / 768, rel=0.02)
    assert figures["health/std_off_sqrt_d"] == pytest.approx(1, abs=0.02)


def test_a_constant_tower_owns_the_similarity():
    image, text = (health_figures(dead(side)(128, 64, 0)) for side in ("image", "text"))
    assert image["health/column_share"] == pytest.approx(1)
    assert text["health/row_share"] == pytest.approx(1)
    assert image["health/variance_image"] < 1e-9 < text["health/variance_image"]
    assert image["health/rankme_image"] < 1.01
    assert image["health/delta_z"] == 0
    assert image["health/accuracy_t2i"] == 0


def test_exact_collapse_gives_finite_figures():
    figures = health_figures(joint_collapse(0.0)(128, 64, 0))
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["health/auc"] == 0.5
    assert figures["health/accuracy_i2t"] == 0


def test_rows_of_zeros_have_no_variance():
    pairs = replace(healthy(0.5)(64, 32, 0), image=torch.zeros(64, 32))
    figures = health_figures(pairs)
    assert figures["health/variance_image"] == 0
    assert all(math.isfinite(value) for value in figures.values())


def test_captions_of_one_image_are_not_compared_with_each_other():
    one = healthy(0.5)(50, 32, 0)
    five = Pairs(
        one.image,
        one.text.repeat_interleave(5, dim=0),
        one.image_ids,
        one.text_ids.repeat_interleave(5),
    )
    flat = replace(
        five, image=five.image.repeat_interleave(5, dim=0), image_ids=five.text_ids.clone()
    )
    assert health_figures(five) == health_figures(one) == health_figures(flat)


def test_a_large_set_is_thinned_the_same_way_each_time():
    pairs = isotropic(600, 16, 0)
    first, second = health_figures(pairs, 100), health_figures(pairs, 100)
    assert first == second
    assert first["health/pairs"] == 100


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5])
def test_figures_of_a_handful_of_pairs_are_finite(num):
    figures = health_figures(isotropic(num, 16, 0))
    assert figures["health/pairs"] == num
    assert all(math.isfinite(value) for value in figures.values())


def test_nan_is_refused():
    pairs = isotropic(64, 16, 0)
    pairs.text[3, 2] = torch.nan
    with pytest.raises(DataError, match="1 of 64 text embeddings"):
        health_figures(pairs)


def test_health_figures_of_a_thinned_probe_take_under_300_ms():
    pairs = as_pairs(*(torch.randn(2048, 512).numpy() for _ in range(2)))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        health_figures(pairs, PROBE_ROWS)
        seconds.append(time.perf_counter() - start)
    # Ten times what it takes alone on one core; all rows would take more.
    assert min(seconds) < 0.3
