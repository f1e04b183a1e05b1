"""The example of docs/doctor.md: mean -0.0132, deviation 0.0381, diagonal -0.0134, width 768."""

import numpy as np
import pytest

from mmscale.diagnostics.doctor import diagnose
from mmscale.diagnostics.geometry import health_figures
from tests.unit.diagnostics.faulty_embeddings import as_pairs, dead, low_rank, shuffled

MEAN, DEVIATION, DIAGONAL, WIDTH = -0.0132, 0.0381, -0.0134, 768


def of_the_log(num, seed):
    """Rows with a mild cone each, whose product is the mean; unaligned within the cone."""
    rng = np.random.default_rng(seed)
    axis = np.zeros(WIDTH)
    axis[0] = np.sqrt(-MEAN)
    rows = rng.normal(size=(2, num, WIDTH)) * np.sqrt((1 + MEAN) / WIDTH)
    # A few directions carry more, so that cosines deviate a little more than isotropic ones.
    rows[..., 1:25] *= 1.6
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    rows *= np.sqrt(1 + MEAN)
    return as_pairs(rows[0] + axis, rows[1] - axis)


@pytest.mark.parametrize("num", [128, 512])
@pytest.mark.parametrize("seed", range(3))
def test_embeddings_with_the_figures_of_the_log_are_unaligned(num, seed):
    pairs = of_the_log(num, seed)
    figures = health_figures(pairs)
    assert figures["health/unmatched"] == pytest.approx(MEAN, abs=0.002)
    assert figures["health/std_off_sqrt_d"] == pytest.approx(DEVIATION * WIDTH**0.5, abs=0.05)
    assert figures["health/matched"] == pytest.approx(DIAGONAL, abs=4 * DEVIATION / num**0.5)
    diagnosis = diagnose(pairs)
    assert diagnosis.verdict == "unaligned"
    assert "cannot be told apart" in diagnosis.causes[0]
    assert "not updated" in diagnosis.causes[1]
    assert "complete_collapse" not in diagnosis.also


def test_the_difference_that_the_log_allows_excludes_a_healthy_model():
    """A trained CLIP is 0.148 apart; the log's bound is a tenth of it at 32 pairs."""
    for num, bound in ((32, 0.0132), (1000, 0.00236)):
        assert pytest.approx(bound, rel=0.01) == 1.96 * DEVIATION / num**0.5


def narrow(num, width, seed):
    """Each tower in twenty directions of its own."""
    image, text = (low_rank(20, 0.02)(num, width, seed + part) for part in (0, 1))
    return as_pairs(image.image.numpy(), text.text.numpy())


@pytest.mark.parametrize(
    ("make", "verdict"),
    [(shuffled, "shuffled_pairs"), (dead("image"), "dead_tower"), (narrow, "dimensional_collapse")],
)
def test_the_same_deviation_comes_of_other_worlds_with_other_verdicts(make, verdict):
    """Deviations near 1 / sqrt(d) between modalities say nothing of what each is like."""
    pairs = make(512, WIDTH, 0)
    assert 0.5 < health_figures(pairs)["health/std_off_sqrt_d"] < 2
    assert diagnose(pairs).verdict == verdict
