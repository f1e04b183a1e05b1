"""The sigmoid loss: each pair of an image and a caption is judged alone."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import SigLIPTerm
from mmscale.loss import kernels
from mmscale.loss.contrast import Contrast, Direction, PairRows, direction, directions
from mmscale.loss.mining import Mining
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Counts, Given, TermValue, term


def siglip(
    pairs: PairRows,
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    *,
    mining: Mining | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of every pair, summed over captions and averaged over images.

    -1/n sum_ij log sigmoid(z_ij (s x_i.y_j + bias)), z = 1 for equal ids and -1 for others. With a
    bank or mining: the mean of both directions, each over the batch and its remembered columns.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343),
        equation 1.
    """

    def sums(way: Contrast, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"]) -> Sums:
        way = mining(way) if mining else way
        logits = scale * way.similarity + bias
        agreement = F.logsigmoid(logits.where(way.positive, -logits))
        if way.discount is not None:
            agreement = agreement * way.discount.exp()
        counted = way.positive | way.negative
        return (-agreement.where(counted, agreement.new_zeros(())).sum(),)

    if pairs.bank is None and mining is None:
        # Both directions hold the same pairs.
        way = direction(pairs.image, pairs.text, pairs.ids, pairs.peers)
        ways: tuple[Direction, ...] = (replace(way, precision=pairs.precision),)
    else:
        ways = directions(pairs)

    def total(way: Direction) -> Float[Tensor, ""]:
        if mining is None and kernels.run_on(way.rows):
            from mmscale.loss.kernels import fused

            return fused.siglip_sum(way, scale, bias)
        return sum_over_rows(sums, [way], scale, bias)[0]

    losses = [total(way) / len(pairs.ids) for way in ways]
    loss: Tensor = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2
    return loss


@term(SigLIPTerm)
def _siglip(settings: SigLIPTerm, given: Given) -> TermValue:
    bias = given.needed(given.rows.bias, settings, "the logits' bias (model.logit_scale.bias)")
    loss = siglip(given.pairs, given.scale(), bias, mining=given.mining)
    return TermValue(loss, given.of_mined(_bounds))


def _bounds(counts: Counts) -> Bounds:
    """Chance: the best answer that is the same for every pair, a row."""
    everything = (counts.positives + counts.negatives).mean()
    share = counts.positives.mean() / everything
    return Bounds(0.0, everything * (torch.special.entr(share) + torch.special.entr(1 - share)))
