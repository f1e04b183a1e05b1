"""Alignment of pairs and uniformity on the sphere."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Peers
from mmscale.loss.contrast import contrast, wide


def alignment(image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean squared distance of the unit rows of a pair.

    Source: Wang and Isola 2020, "Understanding Contrastive Representation Learning through
        Alignment and Uniformity on the Hypersphere" (arXiv 2005.10242), equation 7, alpha 2.
    """
    return (wide(image) - wide(text)).pow(2).sum(1).mean()


def uniformity(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    peers: Peers,
    t: float = 2.0,
) -> Float[Tensor, ""]:
    """Log of the mean Gaussian potential of a modality's unit rows; the mean of both modalities.

    log mean_{ij: id_i != id_j} exp(-t |x_i - x_j|^2): 0 for rows on one point, near -2t for
    isotropic rows of many dimensions. 0 where no two ids differ.

    Source: Wang and Isola 2020 (arXiv 2005.10242), equation 8.
    """
    values = []
    for rows in (image, text):
        way = contrast(rows, rows, ids, peers)
        potential = (2 * t * (way.similarity - 1)).exp()
        total = peers.total(potential.where(way.negative, potential.new_zeros(())).sum())
        count = peers.total(way.negative.sum().to(total.dtype))
        values.append((total / count.clamp(min=1)).where(count > 0, torch.ones_like(total)).log())
    return (values[0] + values[1]) / 2
