import pytest
import torch

from mmscale.diagnostics.geometry import feature_figures
from mmscale.parallel.peers import Alone


class InTurn(Alone):
    """Peers that hand on the sums of several parts, each in its own rank's place."""

    def __init__(self, parts):
        self._parts = parts

    def columns(self, rows):
        mine = [_sent(part) for part in self._parts]
        assert any(torch.equal(rows, part) for part in mine)
        return torch.cat(mine)


def _sent(rows):
    """What a rank would send for its rows."""
    caught = []

    class Catching(Alone):
        def columns(self, rows):
            caught.append(rows)
            return rows

    feature_figures(rows, Catching(), "tower", "image")
    return caught[0]


def test_ranks_of_unlike_size_give_the_figures_of_all_rows():
    rows = torch.randn(60, 7) * torch.linspace(0.1, 3, 7) + 2
    whole = feature_figures(rows, Alone(), "head", "text")
    parts = feature_figures(rows[:13], InTurn([rows[:13], rows[13:]]), "head", "text")
    assert parts == pytest.approx(whole, rel=1e-12)


def test_figures_against_torch():
    rows = torch.randn(50, 9, dtype=torch.float64) + 0.5
    rows[:, 3] = 1.0
    figures = feature_figures(rows, Alone(), "tower", "image")
    assert figures["tower_mean_image"] == pytest.approx(float(rows.mean()))
    assert figures["tower_std_image"] == pytest.approx(float(rows.std(unbiased=False)))
    assert figures["tower_low_image"] == float(rows.min())
    assert figures["tower_high_image"] == float(rows.max())
    lengths = rows.norm(dim=1)
    assert figures["tower_norm_image"] == pytest.approx(float(lengths.mean()))
    spread = float(lengths.std(unbiased=False) / lengths.mean())
    assert figures["tower_norm_spread_image"] == pytest.approx(spread)
    share = float(rows.var(dim=0, unbiased=False).mean() / rows.square().mean())
    assert figures["tower_spread_image"] == pytest.approx(share)
    assert figures["tower_low_dims_image"] == 1


def test_rows_that_are_all_the_same_have_no_spread():
    rows = torch.randn(1, 40).repeat(30, 1) * 1e3
    figures = feature_figures(rows, Alone(), "tower", "text")
    assert figures["tower_spread_text"] == 0
    assert figures["tower_low_dims_text"] == 40


def test_rows_of_zeros_are_finite():
    figures = feature_figures(torch.zeros(30, 4), Alone(), "tower", "text")
    assert set(figures.values()) == {0.0, 4.0}
