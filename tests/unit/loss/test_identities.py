"""Losses that are one another in special cases, and loops that spell a formula out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.contracts import Bank
from mmscale.loss.contrast import PairRows, direction
from mmscale.loss.distillation import distillation
from mmscale.loss.hinge import hinge
from mmscale.loss.infonce import infonce_in_strips
from mmscale.loss.sigmoid import siglip
from mmscale.loss.softmax import dcl, hn_nce, ntxent, supcon
from mmscale.loss.spectral import spectral
from mmscale.loss.sphere import alignment, uniformity
from mmscale.loss.statistics import decorrelation, diversity, regression, vicreg
from mmscale.loss.supervised import classification, matching
from mmscale.parallel.peers import Alone

IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
EYE = torch.arange(8)


def unit_rows(seed: int, rows: int = 8, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def of(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


X, Y, SCALE = unit_rows(0), unit_rows(1), of(11.0)
PAIRS, DISTINCT = (PairRows(X, Y, ids, Alone()) for ids in (IDS, EYE))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.item() == pytest.approx(second.item(), rel=1e-12, abs=1e-12)


def test_hn_nce_that_weighs_all_alike_is_infonce_and_without_positives_dcl():
    for ids in (IDS, EYE):
        plain = infonce_in_strips(PairRows(X, Y, ids, Alone()), SCALE)
        # With several positives the mean of logs is not the log of the mean.
        assert same(hn_nce(PairRows(X, Y, ids, Alone()), SCALE, alpha=1.0, beta=0.0), plain)
        decoupled = hn_nce(PairRows(X, Y, ids, Alone()), SCALE, alpha=0.0, beta=0.0)
        assert same(decoupled, dcl(PairRows(X, Y, ids, Alone()), SCALE))


def test_rows_that_repeat_exactly_make_one_positive_as_good_as_all():
    x, y = X[IDS].requires_grad_(), Y[IDS].requires_grad_()
    by_id = infonce_in_strips(PairRows(x, y, IDS, Alone()), SCALE)
    by_row = infonce_in_strips(PairRows(x, y, EYE, Alone()), SCALE)
    assert same(by_id, by_row)
    gradients = [torch.autograd.grad(loss, (x, y)) for loss in (by_id, by_row)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-14)


def test_distillation_without_opinion_is_infonce_against_the_momentum_rows():
    value, entropy = distillation(PAIRS, (X, Y), SCALE, alpha=0.0)
    assert same(value, infonce_in_strips(PAIRS, SCALE))
    sizes = torch.tensor([2, 2, 1, 3, 3, 3, 1, 1], dtype=torch.float64)
    assert same(entropy, sizes.log().mean())


def test_distillation_towards_its_own_opinion_has_no_gradient():
    """Where the momentum rows are the rows themselves and only they are asked."""
    x = X.clone().requires_grad_()
    value, entropy = distillation(PairRows(x, Y, IDS, Alone()), (X, Y), SCALE, alpha=1.0)
    assert same(value, entropy)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_distillation_finds_positives_in_the_queue():
    """A queue of the batch's own momentum rows doubles every column: ln 2 more, and no more."""
    bank = Bank(X, Y, IDS)
    alone = distillation(PAIRS, (X, Y), SCALE, alpha=0.3)
    doubled = distillation(PairRows(X, Y, IDS, Alone(), bank), (X, Y), SCALE, alpha=0.3)
    assert same(doubled.loss, alone.loss + math.log(2))
    assert same(doubled.entropy, alone.entropy + math.log(2))


def test_two_views_of_distinct_images_need_no_distinction():
    assert same(supcon(DISTINCT, SCALE), ntxent(DISTINCT, SCALE))


def test_supcons_factor_is_its_temperature_over_the_base():
    plain = supcon(PAIRS, of(10.0))
    assert same(supcon(PAIRS, of(10.0), base_temperature=0.05), plain * 0.1 / 0.05)


def test_ntxent_leaves_other_captions_of_the_image_out():
    """Loops over the definition."""
    z, ids = torch.cat([X, Y]), torch.cat([IDS, IDS])
    total = 0.0
    for i in range(16):
        partner = (i + 8) % 16
        columns = [j for j in range(16) if ids[j] != ids[i] or j == partner]
        logits = torch.stack([SCALE[0] * z[i] @ z[j] for j in columns])
        total += (logits.logsumexp(0) - SCALE[0] * z[i] @ z[partner]).item()
    assert ntxent(PAIRS, SCALE).item() == pytest.approx(total / 16, rel=1e-12)


def test_a_queue_is_more_columns_without_a_gradient():
    """Empty slots and the row's own id are not there; the others count as batch columns do."""
    slots = torch.tensor([-1, 2, 50, 51])
    bank = Bank(unit_rows(2, 4), unit_rows(3, 4), slots)
    total, clip = 0.0, 0.0
    for rows, columns, more in ((X, Y, bank.text), (Y, X, bank.image)):
        for i in range(8):
            kept = [j for j in range(4) if slots[j] >= 0 and slots[j] != IDS[i]]
            negatives = [columns[j] for j in range(8) if IDS[j] != IDS[i]]
            negatives += [more[j] for j in kept]
            positives = SCALE[0] * (columns[IDS[i] == IDS] @ rows[i])
            logits = SCALE[0] * torch.stack(negatives) @ rows[i]
            clip += (torch.cat([positives, logits]).logsumexp(0) - positives.mean()).item()
            cost = 0.2 + torch.stack(negatives) @ rows[i] - columns[i] @ rows[i]
            total += cost.clamp(min=0).max().item()
    assert infonce_in_strips(PairRows(X, Y, IDS, Alone(), bank), SCALE).item() == pytest.approx(
        clip / 16, rel=1e-12
    )
    assert hinge(PairRows(X, Y, IDS, Alone(), bank)).item() == pytest.approx(total / 8, rel=1e-12)


def test_siglip_counts_the_batch_once_and_each_queue_half():
    bank = Bank(unit_rows(2, 3), unit_rows(3, 3), torch.tensor([-1, 2, 50]))
    bias = of(-4.0)
    wanted = siglip(PAIRS, SCALE, bias).item()
    for rows, more in ((X, bank.text), (Y, bank.image)):
        for i in range(8):
            for j in range(3):
                if bank.ids[j] >= 0 and bank.ids[j] != IDS[i]:
                    logit = SCALE[0] * rows[i] @ more[j] + bias[0]
                    wanted += F.softplus(logit).item() / 16
    found = siglip(PairRows(X, Y, IDS, Alone(), bank), SCALE, bias).item()
    assert found == pytest.approx(wanted, rel=1e-12)


def test_label_smoothing_mixes_in_the_mean_of_every_column():
    logits = 11 * X @ Y.T
    uniform = (logits.logsumexp(1) - logits.mean(1)).mean()
    uniform = (uniform + (logits.logsumexp(0) - logits.mean(0)).mean()) / 2
    plain = infonce_in_strips(PAIRS, SCALE)
    smoothed = infonce_in_strips(PAIRS, SCALE, smoothing=0.25)
    assert same(smoothed, 0.75 * plain + 0.25 * uniform)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=7), scale=st.floats(1, 50))
def test_infonce_by_slow_loops(ids, scale):
    """Khosla et al. 2020, equation 2, across modalities and in both directions."""
    x, y = X[: len(ids)], Y[: len(ids)]
    total = 0.0
    for rows, columns in ((x, y), (y, x)):
        for i in range(len(ids)):
            logits = [scale * float(rows[i] @ columns[j]) for j in range(len(ids))]
            everything = math.log(sum(math.exp(value) for value in logits))
            positives = [logits[j] for j in range(len(ids)) if ids[j] == ids[i]]
            total += sum(everything - value for value in positives) / len(positives)
    loss = infonce_in_strips(PairRows(x, y, torch.tensor(ids), Alone()), of(scale))
    assert loss.item() == pytest.approx(total / (2 * len(ids)), rel=1e-10, abs=1e-10)


def test_hinge_of_a_collapsed_batch_is_two_margins():
    one = X[:1].repeat(8, 1)
    assert hinge(PairRows(one, one, EYE, Alone())).item() == pytest.approx(0.4)
    assert hinge(PairRows(one, one, EYE, Alone()), hardness=0.0).item() == pytest.approx(0.4 * 7)


def test_hinge_by_hardness_goes_from_all_negatives_to_the_hardest():
    ends = [hinge(PAIRS, hardness=h) for h in (0.0, 1.0)]
    between = hinge(PAIRS, hardness=0.25)
    assert same(between, 0.75 * ends[0] + 0.25 * ends[1])


def test_semi_hard_negatives_lie_behind_the_pair():
    way = direction(X, Y, IDS, Alone()).contrast()
    total = 0.0
    for similarity in (way.similarity, way.similarity.T):
        for i in range(8):
            behind = [
                0.2 + similarity[i, j] - similarity[i, i]
                for j in range(8)
                if IDS[j] != IDS[i] and similarity[i, j] < similarity[i, i]
            ]
            total += max([float(cost) for cost in behind] + [0.0])
    found = hinge(PAIRS, semi_hard=True).item()
    assert found == pytest.approx(total / 8, rel=1e-12)


def test_spectral_shortens_long_rows_only_and_leaves_positives_alone():
    long, short = 5 * X, 0.5 * Y
    products = (2**0.5 * X) @ short.T
    pairs = products.diagonal().mean()
    others = products.pow(2)[IDS[:, None] != IDS[None, :]].mean()
    found = spectral(long, short, IDS, Alone(), mu=2.0)
    assert same(found, (others - 2 * pairs) / 2)


def test_alignment_is_regression_summed_over_dimensions():
    assert same(alignment(X, Y), 6 * regression(X, Y))
    assert same(
        vicreg(X, Y, Alone(), invariance=25.0, variance=0.0, covariance=0.0), 25 * regression(X, Y)
    )


def test_uniformity_of_one_point_is_zero_and_of_a_simplex_least():
    one = X[:1].repeat(8, 1)
    assert uniformity(PairRows(one, one, EYE, Alone())).item() == pytest.approx(0, abs=1e-12)
    simplex = F.normalize(torch.eye(8, dtype=torch.float64) - 1 / 8, dim=1)
    least = -2 * 2 * 8 / 7
    assert uniformity(PairRows(simplex, simplex, EYE, Alone())).item() == pytest.approx(least)
    assert uniformity(DISTINCT).item() > least


def test_decorrelation_is_zero_for_a_whitened_batch_and_width_less_one_on_a_line():
    rows = unit_rows(5, 40)
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    white = 100 * centred @ vectors / values.sqrt()
    assert decorrelation(white, white, Alone()).item() == pytest.approx(0, abs=1e-10)
    line = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None] * 100 * X[:1]
    assert decorrelation(line, line, Alone()).item() == pytest.approx(5, rel=1e-6)


def test_decorrelation_of_few_rows_cannot_fall_under_its_floor():
    """Unless a dimension stops varying, which no correlation sees."""
    for seed in range(20):
        rows = 1000 * unit_rows(seed, 4)
        assert decorrelation(rows, rows, Alone()).item() >= 6 / 3 - 1 - 1e-6


def test_diversity_is_nothing_where_dimensions_vary_and_two_where_none_does():
    spread = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    assert diversity(spread, spread, Alone(), floor=0.5).item() == 0
    one = X[:1].repeat(8, 1)
    assert diversity(one, one, Alone(), floor=0.5).item() == pytest.approx(2, abs=1e-3)
    # Two of six dimensions are constant.
    low = torch.cat([torch.eye(4, 6), -torch.eye(4, 6)]).double()
    assert diversity(low, low, Alone(), floor=0.5).item() == pytest.approx(
        (1 + 1 / 3) / 3, abs=1e-3
    )


def test_cross_entropies_of_heads_that_know_nothing():
    logits, labels = torch.zeros(6, 3), torch.tensor([0, 1, 2, -1, -1, 2])
    assert classification(logits, labels, Alone()).item() == pytest.approx(math.log(3))
    prior = torch.tensor([[2.0, 1.0]]).log().repeat(6, 1)
    found = matching(prior, torch.tensor([1, 1, 0, 0, 0, 0]), Alone())
    assert found.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
