"""Losses on the statistics of the global batch: no negatives, no ids.

Means and covariances are taken over the rows of all ranks. Several rows of one image make a
batch's variance look smaller than it is.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import (
    BarlowTerm,
    DecorrelationTerm,
    DiversityTerm,
    RegressionTerm,
    VICRegTerm,
)
from mmscale.contracts import Peers
from mmscale.loss.contrast import wide
from mmscale.loss.term import Bounds, Counts, Given, TermValue, term


def vicreg(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    peers: Peers,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Float[Tensor, ""]:
    """Pairs close, each dimension's deviation above 1, dimensions uncorrelated.

    invariance * mean_nd (x - y)^2 + variance * mean over modalities and dimensions of
    max(0, 1 - sqrt(var + 1e-4)) + covariance * sum over modalities of sum_{i != j} cov_ij^2 / d,
    with unbiased variances: the authors' code, which halves the paper's variance term and averages
    the distance over dimensions.

    Args:
        image: The head's outputs for the images: on unit rows the deviation could never reach 1.
        text: The head's outputs for the captions; row i belongs to image i.
        peers: The ranks that contrast together.
        invariance: Factor of the first part.
        variance: Factor of the second part.
        covariance: Factor of the third part.

    Source: Bardes et al. 2022, "VICReg" (arXiv 2105.04906), section 4.1.
    """
    hinges, covariances = [], []
    for rows in (image, text):
        centred, count = _centred(rows, peers)
        matrix = peers.total(centred.T @ centred) / max(count - 1, 1)
        hinges.append(F.relu(1 - (matrix.diagonal() + 1e-4).sqrt()).mean())
        covariances.append(_off_diagonal_squares(matrix) / len(matrix))
    return (
        invariance * regression(image, text)
        + variance * (hinges[0] + hinges[1]) / 2
        + covariance * (covariances[0] + covariances[1])
    )


def barlow(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    peers: Peers,
    *,
    redundancy: float = 0.0051,
) -> Float[Tensor, ""]:
    """The correlation matrix between the modalities' dimensions becomes the identity.

    sum_i (1 - c_ii)^2 + redundancy * sum_{i != j} c_ij^2, c = a^T b / n of rows standardised with
    biased variances and 1e-5 added to them.

    Args:
        image: The head's outputs for the images: the 1e-5 would bite on unit rows.
        text: The head's outputs for the captions; row i belongs to image i.
        peers: The ranks that contrast together.
        redundancy: Factor of the second sum.

    Source: Zbontar et al. 2021, "Barlow Twins" (arXiv 2103.03230), equations 1 and 2.
    """
    (first, count), (second, _) = _standardised(image, peers), _standardised(text, peers)
    matrix = peers.total(first.T @ second) / count
    return (1 - matrix.diagonal()).pow(2).sum() + redundancy * _off_diagonal_squares(matrix)


def decorrelation(
    image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], peers: Peers
) -> Float[Tensor, ""]:
    """Squared correlations between a modality's dimensions: sum_{i != j} corr_ij^2 / d.

    The mean of both modalities; d - 1 for rows on one line. n rows span at most n - 1 directions,
    so below d of them it cannot fall under d / (n - 1) - 1 while every dimension varies.

    Source: Barlow Twins' redundancy within one modality; Cogswell et al. 2016, "Reducing
        Overfitting in Deep Networks by Decorrelating Representations" (arXiv 1511.06068).
    """
    values = []
    for rows in (image, text):
        standard, count = _standardised(rows, peers)
        matrix = peers.total(standard.T @ standard) / count
        values.append(_off_diagonal_squares(matrix) / len(matrix))
    return (values[0] + values[1]) / 2


def diversity(
    image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], peers: Peers, *, floor: float = 0.5
) -> Float[Tensor, ""]:
    """Penalty on dimensions of unit rows that hardly vary, the harder the more of them there are.

    With r_k = deviation_k sqrt(d), 1 for isotropic rows, and p the share of dimensions with r_k <
    floor (without a gradient): (1 + p) mean_k max(0, 1 - r_k / floor). The mean of both modalities;
    0 when all dimensions vary enough, 2 when none does.
    """
    values = []
    for rows in (image, text):
        centred, count = _centred(rows, peers)
        variance = peers.total(centred.pow(2).sum(0)) / count
        # Keeps the root's gradient finite where a dimension is constant.
        ratio = (variance * len(variance) + 1e-8).sqrt() / floor
        share = (ratio.detach() < 1).to(ratio.dtype).mean()
        values.append((1 + share) * F.relu(1 - ratio).mean())
    return (values[0] + values[1]) / 2


def regression(image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean squared error of the pairs, over rows and dimensions."""
    return (wide(image) - wide(text)).pow(2).mean()


def _centred(rows: Float[Tensor, "b d"], peers: Peers) -> tuple[Float[Tensor, "b d"], int]:
    """Rows minus the mean of the global batch, and how many rows that has."""
    rows, count = wide(rows), peers.size * len(rows)
    return rows - peers.total(rows.sum(0)) / count, count


def _standardised(rows: Float[Tensor, "b d"], peers: Peers) -> tuple[Float[Tensor, "b d"], int]:
    centred, count = _centred(rows, peers)
    variance = peers.total(centred.pow(2).sum(0)) / count
    return centred * torch.rsqrt(variance + 1e-5), count


def _off_diagonal_squares(matrix: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    return matrix.pow(2).sum() - matrix.diagonal().pow(2).sum()


@term(VICRegTerm)
def _vicreg(settings: VICRegTerm, given: Given) -> TermValue:
    loss = vicreg(
        *given.projected,
        given.peers,
        invariance=settings.invariance,
        variance=settings.variance,
        covariance=settings.covariance,
    )
    return TermValue(loss, _from_zero)


@term(BarlowTerm)
def _barlow(settings: BarlowTerm, given: Given) -> TermValue:
    loss = barlow(*given.projected, given.peers, redundancy=settings.redundancy)
    return TermValue(loss, _from_zero)


@term(DecorrelationTerm)
def _decorrelation(settings: DecorrelationTerm, given: Given) -> TermValue:
    def bounds(counts: Counts) -> Bounds:
        return Bounds(max(0.0, counts.width / max(len(counts) - 1, 1) - 1))

    return TermValue(decorrelation(*given.projected, given.peers), bounds)


@term(DiversityTerm)
def _diversity(settings: DiversityTerm, given: Given) -> TermValue:
    pairs = given.pairs
    loss = diversity(pairs.image, pairs.text, given.peers, floor=settings.floor)
    return TermValue(loss, _from_zero)


@term(RegressionTerm)
def _regression(settings: RegressionTerm, given: Given) -> TermValue:
    return TermValue(regression(*given.projected), _from_zero)


def _from_zero(counts: Counts) -> Bounds:
    """A sum of squares, or of what is positive; what it is at chance depends on the heads."""
    return Bounds(0.0)
