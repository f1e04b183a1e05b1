"""The sigmoid loss: each pair of an image and a caption is judged alone."""

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Bank, Peers
from mmscale.loss.contrast import Contrast, contrast, contrasts
from mmscale.loss.mining import Mining


def siglip(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    peers: Peers,
    bank: Bank | None = None,
    mining: Mining | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of every pair, summed over captions and averaged over images.

    -1/n sum_ij log sigmoid(z_ij (s x_i.y_j + bias)), z = 1 for equal ids and -1 for others. With a
    bank or mining: the mean of both directions, each over the batch and its remembered columns.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343),
        equation 1.
    """

    def direction(way: Contrast) -> Float[Tensor, ""]:
        way = mining(way) if mining else way
        logits = scale * way.similarity + bias
        agreement = F.logsigmoid(logits.where(way.positive, -logits))
        if way.discount is not None:
            agreement = agreement * way.discount.exp()
        counted = way.positive | way.negative
        return -agreement.where(counted, agreement.new_zeros(())).sum() / len(ids)

    if bank is None and mining is None:
        # Both directions hold the same pairs.
        return direction(contrast(image, text, ids, peers))
    first, second = (direction(way) for way in contrasts(image, text, ids, peers, bank))
    return (first + second) / 2
