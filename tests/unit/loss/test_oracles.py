"""The losses beside libraries that compute them, live."""

import pytest
import torch
import torch.nn.functional as F

from mmscale.loss.contrast import PairRows
from mmscale.loss.hinge import hinge
from mmscale.loss.infonce import infonce, infonce_in_strips
from mmscale.loss.sigmoid import siglip
from mmscale.loss.softmax import ntxent, supcon
from mmscale.loss.statistics import barlow, decorrelation, vicreg
from mmscale.parallel.peers import Alone

ROWS, WIDTH = 16, 32
EYE = torch.arange(ROWS)
IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11])


@pytest.fixture
def raw():
    return (3 * torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(2))


@pytest.fixture
def unit(raw):
    return [F.normalize(rows, dim=1) for rows in raw]


def of(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# The one that runs, and the one that is ranked and smoothed.
INFONCE = (infonce, infonce_in_strips)


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10, abs=1e-10)


def test_infonce_is_open_clips(unit):
    from open_clip.loss import ClipLoss

    x, y = unit
    for ours in INFONCE:
        theirs = ClipLoss()(x, y, torch.tensor(20.0).double())
        agree(ours(PairRows(x, y, EYE, Alone()), of(20)), theirs)


def test_infonce_is_transformers(unit):
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    x, y = unit
    for ours in INFONCE:
        theirs = image_text_contrastive_loss(20 * y @ x.T)
        agree(ours(PairRows(x, y, EYE, Alone()), of(20)), theirs)


def test_siglip_is_open_clips(unit):
    from open_clip.loss import SigLipLoss

    x, y = unit
    theirs = SigLipLoss()(x, y, torch.tensor(12.0).double(), torch.tensor(-9.0).double())
    agree(siglip(PairRows(x, y, EYE, Alone()), of(12), of(-9)), theirs)


def test_infonce_with_repeated_ids_is_supcon_across_modalities(unit):
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="needs mmscale[oracle]")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    x, y = unit
    theirs = losses.SupConLoss(temperature=0.1, reducer=reducers.MeanReducer())
    # One object for both label arguments would take the diagonal out.
    one, other = (
        theirs(rows, IDS, ref_emb=columns, ref_labels=IDS.clone())
        for rows, columns in ((x, y), (y, x))
    )
    for ours in INFONCE:
        agree(ours(PairRows(x, y, IDS, Alone()), of(10)), (one + other) / 2)


def test_supcon_over_two_views_is_metric_learnings(unit):
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="needs mmscale[oracle]")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    x, y = unit
    theirs = losses.SupConLoss(temperature=0.1, reducer=reducers.MeanReducer())
    agree(
        supcon(PairRows(x, y, IDS, Alone()), of(10)),
        theirs(torch.cat([x, y]), torch.cat([IDS, IDS])),
    )


def test_hinge_is_the_triplet_margin_loss_of_metric_learning(unit):
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="needs mmscale[oracle]")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    x, y = unit
    theirs = losses.TripletMarginLoss(
        margin=0.2, distance=distances.CosineSimilarity(), reducer=reducers.SumReducer()
    )
    total = sum(
        theirs(rows, EYE, ref_emb=columns, ref_labels=EYE.clone())
        for rows, columns in ((x, y), (y, x))
    )
    agree(ROWS * hinge(PairRows(x, y, EYE, Alone()), hardness=0.0), total)


def test_ntxent_is_lightlys(unit):
    loss = pytest.importorskip("lightly.loss", reason="needs mmscale[oracle]")
    x, y = unit
    agree(ntxent(PairRows(x, y, EYE, Alone()), of(10)), loss.NTXentLoss(temperature=0.1)(x, y))


def test_statistics_are_lightlys(raw):
    loss = pytest.importorskip("lightly.loss", reason="needs mmscale[oracle]")
    x, y = raw
    agree(vicreg(x, y, Alone()), loss.VICRegLoss()(x, y))
    agree(barlow(x, y, Alone(), redundancy=0.005), loss.BarlowTwinsLoss(lambda_param=0.005)(x, y))
    module = pytest.importorskip("lightly.loss.vicreg_loss")
    standard = [
        (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt() for rows in (x, y)
    ]
    # Theirs divides by n - 1.
    theirs = sum(map(module.covariance_loss, standard)) / 2 * ((ROWS - 1) / ROWS) ** 2
    agree(decorrelation(x, y, Alone()), theirs)
