"""Softmax losses across modalities.

A loss takes this rank's rows and the peers, and returns the mean over its own rows; see
`dist/peers.py` for what that means for the gradients. Each is the mean of both directions.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Bank, Peers
from mmscale.loss.contrast import (
    Contrast,
    contrasts,
    discounted,
    logsumexp_where,
    mean_of_all,
    mean_where,
)
from mmscale.loss.mining import Mining


def infonce(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    bank: Bank | None = None,
    smoothing: float = 0.0,
    mining: Mining | None = None,
) -> Float[Tensor, ""]:
    """Symmetric multi-positive InfoNCE: cross-entropy against uniform targets over equal ids.

    For each image i: logsumexp_j(s x_i.y_j) - mean_{p: id_p = id_i}(s x_i.y_p); the same for each
    caption over the images. With distinct ids it is CLIP's loss, with equal ones SupCon's L_out
    across modalities. Its floor is the mean of ln(number of positives).

    Args:
        image: Unit rows of the images.
        text: Unit rows of the captions; row i belongs to image i.
        ids: Identity of each row.
        scale: 1 / temperature.
        peers: The ranks that contrast together.
        bank: Further negatives.
        smoothing: Share of the target that goes to all columns, to each by what it counts.
        mining: Lets hard negatives count more than others.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; Khosla et al. 2020 (arXiv 2004.11362),
        equation 2.
    """

    def direction(way: Contrast) -> Float[Tensor, ""]:
        way = mining(way) if mining else way
        logits, everything = scale * way.similarity, way.positive | way.negative
        target = mean_where(logits, way.positive)
        if smoothing:
            target = (1 - smoothing) * target + smoothing * mean_of_all(logits, way)
        return (logsumexp_where(discounted(logits, way), everything) - target).mean()

    first, second = (direction(way) for way in contrasts(image, text, ids, peers, bank))
    return (first + second) / 2


def dcl(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    bank: Bank | None = None,
    mining: Mining | None = None,
) -> Float[Tensor, ""]:
    """Decoupled contrastive loss across modalities: InfoNCE without positives in the denominator.

    For each image i: log sum_{j: id_j != id_i} exp(s x_i.y_j) - mean_{p: id_p = id_i}(s x_i.y_p).
    Unbounded below. A row without a negative adds nothing.

    Source: Yeh et al. 2022, "Decoupled Contrastive Learning" (arXiv 2110.06848), equation 6,
        without its negatives of the same modality.
    """

    def direction(way: Contrast) -> Float[Tensor, ""]:
        way = mining(way) if mining else way
        logits = scale * way.similarity
        total = logsumexp_where(discounted(logits, way), way.negative)
        loss = total - mean_where(logits, way.positive)
        return loss.where(total > -torch.inf, torch.zeros_like(loss)).mean()

    first, second = (direction(way) for way in contrasts(image, text, ids, peers, bank))
    return (first + second) / 2


def hn_nce(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    bank: Bank | None = None,
    alpha: float = 1.0,
    beta: float = 0.5,
) -> Float[Tensor, ""]:
    """InfoNCE whose negatives weigh more the harder they are.

    For each image i, with l = s x.y, its positives p and its m negatives j:
    log(alpha sum_p e^{l_ip} + sum_j w_ij e^{l_ij}) - mean_p l_ip, w_ij = m softmax_j(beta l_ij).
    alpha = 1 and beta = 0 is InfoNCE; alpha = 0 and beta = 0 is DCL. A row without negatives adds
    nothing where alpha = 0.

    Source: Radenovic et al. 2023, "Filtering, Distillation, and Hard Negatives for Vision-Language
        Pre-Training" (arXiv 2301.02280), section 3.3.
    """

    def direction(way: Contrast) -> Float[Tensor, ""]:
        logits = scale * way.similarity
        count = way.negative.sum(1).to(logits.dtype)
        # Without negatives both sums are -inf: their difference must not be taken.
        spread = logsumexp_where(beta * logits, way.negative)
        offset = count.clamp(min=1).log() - spread.where(count > 0, torch.zeros_like(spread))
        total = logsumexp_where((1 + beta) * logits + offset[:, None], way.negative)
        if alpha:
            positives = logsumexp_where(logits, way.positive) + math.log(alpha)
            total = torch.logaddexp(total, positives)
        loss = total - mean_where(logits, way.positive)
        return loss.where(total > -torch.inf, torch.zeros_like(loss)).mean()

    first, second = (direction(way) for way in contrasts(image, text, ids, peers, bank))
    return (first + second) / 2
