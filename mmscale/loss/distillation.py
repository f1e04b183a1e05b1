"""Momentum distillation: targets from what slowly moving encoders find similar."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import DistillationTerm
from mmscale.loss.contrast import PairRows, wide
from mmscale.loss.term import Bounds, Counts, Given, TermValue, log_mean, term


class Distilled(NamedTuple):
    """The loss, and the entropy of its targets: the least it can be."""

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def distillation(
    pairs: PairRows,
    momentum: tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]],
    scale: Float[Tensor, "1"],
    *,
    alpha: float = 0.4,
) -> Distilled:
    """InfoNCE against the momentum rows, with targets half by id and half by opinion.

    For each image i over the momentum captions v_j of the batch and the bank: cross-entropy of
    softmax_j(s x_i.v_j) against alpha softmax_j(s u_i.v_j) + (1 - alpha) P_ij / sum_j P_ij, where
    u_i is the momentum image and P_ij = 1 for equal ids, remembered ones included. The same for
    each caption; the mean of both. alpha = 0 without a bank has InfoNCE's value where the momentum
    rows equal the trained ones. Momentum rows and targets have no gradient.

    Args:
        pairs: The trained encoders' rows.
        momentum: Unit rows of the momentum encoders, images and captions of the same pairs.
        scale: 1 / temperature.
        alpha: Share of the opinion.

    Source: Li et al. 2021, "Align before Fuse" (arXiv 2107.07651), equations 1 and 6.
    """
    ids, peers, bank = pairs.ids, pairs.peers, pairs.bank
    momentum_image, momentum_text = momentum
    sides = (
        (pairs.image, momentum_image, momentum_text, bank.text if bank else None),
        (pairs.text, momentum_text, momentum_image, bank.image if bank else None),
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


@term(DistillationTerm)
def _distillation(settings: DistillationTerm, given: Given) -> TermValue:
    rows, encoder = given.rows, "a momentum encoder"
    momentum_image = given.needed(rows.momentum_image, settings, encoder)
    momentum_text = given.needed(rows.momentum_text, settings, encoder)
    found = distillation(
        given.pairs, (momentum_image, momentum_text), given.scale(), alpha=given.at(settings.alpha)
    )

    def bounds(counts: Counts) -> Bounds:
        everything = counts.positives + counts.negatives + counts.remembered
        return Bounds(found.entropy, log_mean(everything))

    return TermValue(found.loss, bounds)
