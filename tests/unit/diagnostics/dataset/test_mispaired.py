import pytest
import torch
import torch.nn.functional as F

from mmscale.diagnostics.dataset.fit import fit_of_embeddings, fit_of_features
from mmscale.diagnostics.dataset.held_out_map import Whitened, folds_of, held_out_rows
from mmscale.diagnostics.dataset.mispaired import mispaired
from tests.unit.diagnostics.dataset.towers import features, planted


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_towers_that_never_met_find_planted_mispairs(share):
    image, text = features(2000, 0)
    source, wrong = planted(2000, share, 1)
    found = mispaired(fit_of_features(image, text[source], torch.arange(2000)))
    sure = found.sure()
    assert found.holds
    assert found.low <= share <= found.high
    assert abs(found.share - share) < 0.3 * share
    assert wrong[sure].double().mean() >= 0.75
    assert wrong[sure].sum() >= 0.8 * wrong.sum()


@pytest.mark.parametrize("seed", range(3))
def test_sound_pairs_raise_no_alarm(seed):
    image, text = features(1000, seed)
    found = mispaired(fit_of_features(image, text, torch.arange(1000)))
    assert not found.holds
    assert found.low == 0.0
    assert not len(found.sure())


def test_pairs_that_have_nothing_in_common_all_stand_as_random_ones():
    """Maps of 96 x 64 weights learnt from 400 pairs fit those, but not what they have not seen."""
    draws = torch.Generator().manual_seed(0)
    image, text = (torch.randn(400, width, generator=draws) for width in (96, 64))
    sides = Whitened(image).by(0.1), Whitened(text).by(0.1)
    ids = torch.arange(400)
    own = torch.cat(
        [(x * y).sum(dim=1) for _, x, y in held_out_rows(sides, folds_of(ids), power=1.0)]
    )
    assert abs(float(own.mean())) < 4 * float(own.std()) / 20
    fit = fit_of_features(image, text, ids)
    assert abs(float(fit.deviates.mean())) < 0.2
    found = mispaired(fit)
    assert found.holds
    assert found.high > 0.9


def test_rows_of_one_image_lie_in_one_fold():
    ids = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(0))
    folds = folds_of(ids)
    for number in range(50):
        assert len(folds[ids == number].unique()) == 1
    assert sorted(folds.unique().tolist()) == list(range(10))


def test_a_models_own_embeddings_find_them_too():
    draws = torch.Generator().manual_seed(0)
    shown = torch.randn(2000, 32, generator=draws)
    image, text = (
        F.normalize(shown + 0.7 * torch.randn(2000, 32, generator=draws), dim=1) for _ in range(2)
    )
    ids = torch.arange(2000)
    assert not mispaired(fit_of_embeddings(image, text, ids)).holds
    source, wrong = planted(2000, 0.05, 1)
    found = mispaired(fit_of_embeddings(image, text[source], ids))
    assert found.holds
    assert wrong[found.sure()].sum() >= 0.6 * wrong.sum()
