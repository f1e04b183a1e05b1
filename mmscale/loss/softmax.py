"""Softmax losses over the similarity of images and captions.

A loss takes this rank's rows and the peers, and returns the mean over its own rows; see
`dist/peers.py` for what that means for the gradients.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmscale.contracts import Peers


def infonce(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    image_ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
) -> Float[Tensor, ""]:
    """Symmetric multi-positive InfoNCE: cross-entropy against uniform targets over equal image ids.

    For each image i: logsumexp_j(s x_i.y_j) - mean_{p: id_p = id_i}(s x_i.y_p); the same for each
    caption over the images; half the sum of both means. With distinct ids it is CLIP's loss, with
    equal ones SupCon's L_out across modalities. Its floor is the mean of ln(number of positives).

    Each similarity block is computed once: a rank holds the rows of its own images, and the
    captions' sums over images are completed over ranks.

    Args:
        image: Unit rows of the images.
        text: Unit rows of the captions; row i belongs to image i.
        image_ids: Identity of each row's image.
        scale: 1 / temperature.
        peers: The ranks that contrast together.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; Khosla et al. 2020 (arXiv 2004.11362),
        equation 2.
    """
    columns, column_ids = peers.columns(text), peers.columns(image_ids)
    wide = torch.promote_types(image.dtype, torch.float32)
    logits = scale.to(wide) * (image.to(wide) @ columns.to(wide).T)
    positive = image_ids[:, None] == column_ids[None, :]
    image_loss = logits.logsumexp(1) - _mean_where(logits, positive)

    own = slice(peers.first_row(len(text)), peers.first_row(len(text)) + len(text))
    column_sum = peers.logsumexp(logits.logsumexp(0))[own]
    positive_sum = peers.total(logits.where(positive, logits.new_zeros(())).sum(0))[own]
    positive_count = (column_ids[own, None] == column_ids[None, :]).sum(1)
    text_loss = column_sum - positive_sum / positive_count
    return (image_loss.mean() + text_loss.mean()) / 2


def chance(image_ids: Int64[Tensor, " n"]) -> float:
    """InfoNCE of a model that tells nothing apart: ln n, nats."""
    return float(torch.tensor(float(len(image_ids))).log())


def floor(image_ids: Int64[Tensor, " n"]) -> float:
    """InfoNCE of these ids at best: the mean of ln(number of positives), nats."""
    _, inverse, counts = image_ids.unique(return_inverse=True, return_counts=True)
    return float(counts[inverse].double().log().mean())


def _mean_where(logits: Float[Tensor, "b n"], positive: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    return logits.where(positive, logits.new_zeros(())).sum(1) / positive.sum(1)
