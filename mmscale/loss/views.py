"""Softmax losses over images and captions as two views: they contrast within a modality as well."""

from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Peers
from mmscale.loss.contrast import logsumexp_where, mean_where, two_views


def ntxent(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
) -> Float[Tensor, ""]:
    """SimCLR's loss: each of the 2n rows must find its partner among all rows of other ids.

    Mean over the rows z_i of log(e^{s z_i.z_p} + sum_{j: id_j != id_i} e^{s z_i.z_j}) - s z_i.z_p.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
        Representations" (arXiv 2002.05709), equation 1.
    """
    way = two_views(image, text, ids, peers)
    logits, pair = scale * way.similarity, scale * way.pair
    return (logsumexp_where(logits, way.negative).logaddexp(pair) - pair).mean()


def supcon(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    base_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """Supervised contrastive loss: each of the 2n rows must find all rows of its id.

    Mean over the rows z_i of logsumexp_{j != i}(s z_i.z_j) - mean_{p != i: id_p = id_i}(s z_i.z_p),
    times temperature / base_temperature where one is given.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv 2004.11362), equation 2.
    """
    way = two_views(image, text, ids, peers)
    logits = scale * way.similarity
    loss = logsumexp_where(logits, way.positive | way.negative) - mean_where(logits, way.positive)
    factor = 1.0 if base_temperature is None else 1 / (scale.squeeze() * base_temperature)
    return factor * loss.mean()
