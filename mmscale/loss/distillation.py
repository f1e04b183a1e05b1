"""Momentum distillation: targets from what slowly moving encoders find similar."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Bank, Peers
from mmscale.loss.contrast import wide


class Distilled(NamedTuple):
    """The loss, and the entropy of its targets: the least it can be."""

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def distillation(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    momentum_image: Float[Tensor, "b d"],
    momentum_text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    bank: Bank | None = None,
    alpha: float = 0.4,
) -> Distilled:
    """InfoNCE against the momentum rows, with targets half by id and half by opinion.

    For each image i over the momentum captions v_j of the batch and the bank: cross-entropy of
    softmax_j(s x_i.v_j) against alpha softmax_j(s u_i.v_j) + (1 - alpha) P_ij / sum_j P_ij, where
    u_i is the momentum image and P_ij = 1 for equal ids, remembered ones included. The same for
    each caption; the mean of both. alpha = 0 without a bank has InfoNCE's value where the momentum
    rows equal the trained ones. Momentum rows and targets have no gradient.

    Source: Li et al. 2021, "Align before Fuse" (arXiv 2107.07651), equations 1 and 6.
    """
    sides = (
        (image, momentum_image, momentum_text, bank.text if bank else None),
        (text, momentum_text, momentum_image, bank.image if bank else None),
    )
    losses, entropies = [], []
    for rows, judge, candidates, remembered in sides:
        columns, column_ids = peers.columns(wide(candidates).detach()), peers.columns(ids)
        if bank is not None and remembered is not None:
            columns = torch.cat([columns, remembered.to(columns.dtype)])
            column_ids = torch.cat([column_ids, bank.ids])
        empty = column_ids < 0
        logits = (scale * (wide(rows) @ columns.T)).masked_fill(empty, -torch.inf)
        with torch.no_grad():
            opinion = (scale * (wide(judge) @ columns.T)).masked_fill(empty, -torch.inf).softmax(1)
            same = (ids[:, None] == column_ids[None, :]).to(opinion.dtype)
            target = alpha * opinion + (1 - alpha) * same / same.sum(1, keepdim=True)
            entropies.append(torch.special.entr(target).sum(1).mean())
        surprise = -logits.log_softmax(1).masked_fill(empty, 0.0)
        losses.append((target * surprise).sum(1).mean())
    return Distilled((losses[0] + losses[1]) / 2, (entropies[0] + entropies[1]) / 2)
