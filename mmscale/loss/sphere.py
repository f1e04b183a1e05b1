"""Alignment of pairs and uniformity on the sphere."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import AlignmentTerm, UniformityTerm
from mmscale.loss.contrast import Contrast, PairRows, direction, wide
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Counts, Given, TermValue, term


def alignment(image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean squared distance of the unit rows of a pair.

    Source: Wang and Isola 2020, "Understanding Contrastive Representation Learning through
        Alignment and Uniformity on the Hypersphere" (arXiv 2005.10242), equation 7, alpha 2.
    """
    return (wide(image) - wide(text)).pow(2).sum(1).mean()


def uniformity(pairs: PairRows, *, t: float = 2.0) -> Float[Tensor, ""]:
    """Log of the mean Gaussian potential of a modality's unit rows; the mean of both modalities.

    log mean_{ij: id_i != id_j} exp(-t |x_i - x_j|^2): 0 for rows on one point, near -2t for
    isotropic rows of many dimensions. 0 where no two ids differ.

    Source: Wang and Isola 2020 (arXiv 2005.10242), equation 8.
    """

    def sums(way: Contrast) -> Sums:
        potential = (2 * t * (way.similarity - 1)).exp()
        return potential.where(way.negative, potential.new_zeros(())).sum(), way.negative.sum()

    values, peers = [], pairs.peers
    for rows in (pairs.image, pairs.text):
        way = replace(direction(rows, rows, pairs.ids, peers), precision=pairs.precision)
        own, others = sum_over_rows(sums, [way])
        total, count = peers.total(own), peers.total(others.to(own.dtype))
        values.append((total / count.clamp(min=1)).where(count > 0, torch.ones_like(total)).log())
    return (values[0] + values[1]) / 2


@term(AlignmentTerm)
def _alignment(settings: AlignmentTerm, given: Given) -> TermValue:
    loss = alignment(given.pairs.image, given.pairs.text)
    return TermValue(loss, lambda counts: Bounds(0.0, 2.0))


@term(UniformityTerm)
def _uniformity(settings: UniformityTerm, given: Given) -> TermValue:
    def bounds(counts: Counts) -> Bounds:
        # Squared distances of n rows sum to at most 2 n^2, and only other ids' count.
        others = (len(counts) - counts.positives).mean()
        floor = -2 * settings.t * len(counts) / others
        return Bounds(floor.where(others > 0, torch.zeros_like(floor)), 0.0)

    return TermValue(uniformity(given.pairs, t=settings.t), bounds)
