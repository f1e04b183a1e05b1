"""Momentum distillation: targets from what slowly moving encoders find similar."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import DistillationTerm
from mmscale.loss.contrast import Contrast, PairRows, directions, wide
from mmscale.loss.strips import Sums, sum_over_rows
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

    def sums(way: Contrast, judged: Contrast, scale: Float[Tensor, "1"]) -> Sums:
        empty = ~(way.positive | way.negative)
        logits = (scale * way.similarity).masked_fill(empty, -torch.inf)
        with torch.no_grad():
            opinion = (scale * judged.similarity).masked_fill(empty, -torch.inf).softmax(1)
            same = way.positive.to(opinion.dtype)
            target = alpha * opinion + (1 - alpha) * same / same.sum(1, keepdim=True)
            entropy = torch.special.entr(target).sum(1).sum()
        surprise = -logits.log_softmax(1).masked_fill(empty, 0.0)
        return (target * surprise).sum(1).sum(), entropy

    image, text = (rows.detach() for rows in momentum)
    judges = directions(replace(pairs, image=image, text=text))
    found = []
    for rows, judge in zip((pairs.image, pairs.text), judges, strict=True):
        # Remembered columns of a row's own id are positives here.
        opinion = replace(judge, first_negative=None)
        found.append(sum_over_rows(sums, [replace(opinion, rows=wide(rows)), opinion], scale))
    losses, entropies = (
        [total / len(pairs.ids) for total in both] for both in zip(*found, strict=True)
    )
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
