"""Symmetric InfoNCE: the loss of CLIP, in tiles, or in strips where logits are ranked or averaged.

A loss takes this rank's rows and the peers, and returns the mean over its own rows; see
`parallel/peers.py` for what that means for the gradients.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import InfoNCETerm
from mmscale.loss.contrast import (
    Contrast,
    PairRows,
    directions,
    discounted,
    logsumexp_where,
    mean_of_all,
    mean_where,
    wide,
)
from mmscale.loss.mining import Mining
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Counts, Given, TermValue, log_mean, term
from mmscale.loss.tiles import bank_sum, sums_and_positives


@term(InfoNCETerm)
def _infonce(settings: InfoNCETerm, given: Given) -> TermValue:
    pairs, scale = given.pairs, given.scale(settings.temperature)
    smoothing, mining = given.at(settings.label_smoothing), given.mining
    if smoothing or mining is not None:
        loss = infonce_in_strips(pairs, scale, smoothing=smoothing, mining=mining)
    else:
        loss = infonce(pairs, scale)
    return TermValue(loss, given.of_mined(lambda counts: _bounds(counts, smoothing)))


def infonce(pairs: PairRows, scale: Float[Tensor, "1"]) -> Float[Tensor, ""]:
    """Symmetric multi-positive InfoNCE: cross-entropy against uniform targets over equal ids.

    For each image i: logsumexp_j(s x_i.y_j) - mean_{p: id_p = id_i}(s x_i.y_p); the same for each
    caption over the images; the mean of both. With distinct ids it is CLIP's loss, with equal ones
    SupCon's L_out across modalities. Its floor is the mean of ln(number of positives).

    The logits are never held: they are made a tile at a time (`tiles.py`), so that memory grows
    with n and not with n^2. The mean of s x_i.y_p over positives p is s x_i times the mean of their
    y_p. Summed over all ranks' rows it is the same in both directions, so a rank counts that of its
    images twice: the mean over ranks is the loss of the global batch, as ever.

    Args:
        pairs: This rank's.
        scale: 1 / temperature.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; Khosla et al. 2020 (arXiv 2004.11362),
        equation 2.
    """
    image, text, ids, peers, bank = pairs.image, pairs.text, pairs.ids, pairs.peers, pairs.bank
    columns, first = peers.columns(wide(text)), peers.first_row(len(text))
    image_sum, column_sum, positive = sums_and_positives(
        image, columns, scale, column_ids=peers.columns(ids), first=first, precision=pairs.precision
    )
    text_sum = peers.logsumexp(column_sum)[first : first + len(text)]
    if bank is not None:
        hidden = {"ids": ids, "bank_ids": bank.ids}
        image_bank_sum = bank_sum(image, bank.text, scale, **hidden, precision=pairs.precision)
        text_bank_sum = bank_sum(text, bank.image, scale, **hidden, precision=pairs.precision)
        image_sum = torch.logaddexp(image_sum, image_bank_sum)
        text_sum = torch.logaddexp(text_sum, text_bank_sum)
    loss: Tensor = (image_sum.mean() + text_sum.mean()) / 2 - positive.mean()
    return loss


def infonce_in_strips(
    pairs: PairRows,
    scale: Float[Tensor, "1"],
    *,
    smoothing: float = 0.0,
    mining: Mining | None = None,
) -> Float[Tensor, ""]:
    """The same loss from all logits of a row together, for some rows at a time (`strips.py`).

    Args:
        pairs: This rank's.
        scale: 1 / temperature.
        smoothing: Share of the target that goes to all columns, to each by what it counts.
        mining: Lets hard negatives count more than others.
    """

    def sums(way: Contrast, scale: Float[Tensor, "1"]) -> Sums:
        way = mining(way) if mining else way
        logits, everything = scale * way.similarity, way.positive | way.negative
        target = mean_where(logits, way.positive)
        if smoothing:
            target = (1 - smoothing) * target + smoothing * mean_of_all(logits, way)
        return ((logsumexp_where(discounted(logits, way), everything) - target).sum(),)

    first, second = (sum_over_rows(sums, [way], scale)[0] for way in directions(pairs))
    return (first / len(pairs.ids) + second / len(pairs.ids)) / 2


def _bounds(counts: Counts, smoothing: float) -> Bounds:
    """The entropy of the smoothed targets, and that of no opinion."""
    positives, negatives = counts.positives, counts.negatives
    everything = positives + negatives
    spread = smoothing / everything
    own = (1 - smoothing) / positives + spread
    entropy = positives * torch.special.entr(own) + negatives * torch.special.entr(spread)
    return Bounds(entropy.mean(), log_mean(everything))
