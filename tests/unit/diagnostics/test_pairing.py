import pytest
import torch

from mmscale.diagnostics.pairing import cka, pairing_figures
from tests.unit.diagnostics.faulty_embeddings import dead, healthy, load_features, rotated, shuffled


def test_cka_of_trained_and_untrained_clip_is_the_recorded_one(real_data):
    trained = pairing_figures(load_features(real_data, "features_clip.npy"))
    assert trained["health/cka"] == pytest.approx(0.605, abs=5e-4)
    assert trained["health/cka_z"] == pytest.approx(214, rel=0.01)
    untrained = pairing_figures(load_features(real_data, "features_clip_random.npy"))
    assert untrained["health/cka"] == pytest.approx(0.026, abs=5e-4)
    assert untrained["health/cka_z"] == pytest.approx(9, abs=0.5)


def _unbiased_hsic(k, other):
    """Song et al. 2012, equation 5, as written."""
    num = len(k)
    k, other = k.clone().fill_diagonal_(0), other.clone().fill_diagonal_(0)
    ones = torch.ones(num, dtype=torch.float64)
    return (
        torch.trace(k @ other)
        + (ones @ k @ ones) * (ones @ other @ ones) / ((num - 1) * (num - 2))
        - 2 / (num - 2) * (ones @ k @ other @ ones)
    ) / (num * (num - 3))


def test_cka_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, dtype=torch.float64, generator=generator)
    y = x[:, :3] + torch.randn(20, 3, dtype=torch.float64, generator=generator)
    k, other = x @ x.T, y @ y.T
    expected = _unbiased_hsic(k, other) / torch.sqrt(
        _unbiased_hsic(k, k) * _unbiased_hsic(other, other)
    )
    assert cka(x, y)[0] == pytest.approx(float(expected), rel=1e-10)


def test_z_is_that_of_drawn_permutations():
    pairs = healthy(1.0)(40, 64, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(
        [
            cka(pairs.image, pairs.text[torch.randperm(40, generator=generator)])[0]
            for _ in range(2000)
        ]
    )
    value, z = cka(pairs.image, pairs.text)
    assert float(drawn.mean()) == pytest.approx(0, abs=4 * float(drawn.std()) / 2000**0.5)
    assert z == pytest.approx(value / float(drawn.std()), rel=0.08)


def test_cka_z_survives_rotation_and_vanishes_with_shuffling():
    straight, turned, mixed = (
        pairing_figures(make(256, 64, 0))["health/cka_z"]
        for make in (healthy(0.5), rotated, shuffled)
    )
    assert turned == pytest.approx(straight, rel=1e-3)
    assert straight > 50
    assert abs(mixed) < 5


def test_cka_of_a_constant_tower_is_zero():
    figures = pairing_figures(dead("image")(64, 32, 0))
    assert figures == {"health/cka": 0.0, "health/cka_z": 0.0}
