"""Margin ranking: negatives must stay a margin below the pair."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import HingeTerm
from mmscale.loss.contrast import Contrast, PairRows, directions
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Counts, Given, TermValue, term


def hinge(
    pairs: PairRows, *, margin: float = 0.2, hardness: float = 1.0, semi_hard: bool = False
) -> Float[Tensor, ""]:
    """Triplet loss over all negatives (`hardness` 0), the hardest alone (1), or a mixture.

    For each image i: (1 - h) sum_j c_ij + h max_j c_ij with c_ij = max(0, margin + x_i.y_j -
    x_i.y_i) over captions j of other ids; plus the same for each caption. Averaged over pairs and
    summed over directions: n times it is the paper's sum over the batch. A batch that collapses to
    one point stays at 2 margin for hardness 1.

    Args:
        pairs: This rank's.
        margin: Distance that negatives keep.
        hardness: Share of the hardest negative.
        semi_hard: The hardest is taken among those less similar than the pair.

    Source: Faghri et al. 2018, "VSE++" (arXiv 1707.05612), equations 5 and 6; semi-hard: Schroff
        et al. 2015, "FaceNet" (arXiv 1503.03832), section 3.2.
    """

    def sums(way: Contrast) -> Sums:
        cost = F.relu(margin + way.similarity - way.pair[:, None])
        none = cost.new_zeros(())
        candidates = way.negative
        if semi_hard:
            candidates = candidates & (way.similarity < way.pair[:, None])
        every, hardest = cost.where(way.negative, none).sum(1), cost.where(candidates, none).amax(1)
        return (((1 - hardness) * every + hardness * hardest).sum(),)

    first, second = (sum_over_rows(sums, [way])[0] for way in directions(pairs))
    return first / len(pairs.ids) + second / len(pairs.ids)


@term(HingeTerm)
def _hinge(settings: HingeTerm, given: Given) -> TermValue:
    margin, semi_hard, hardness = settings.margin, settings.semi_hard, given.at(settings.hardness)
    loss = hinge(given.pairs, margin=margin, hardness=hardness, semi_hard=semi_hard)

    def bounds(counts: Counts) -> Bounds:
        # Where nothing is told apart none lies behind the pair, and all as far as it.
        hardest = 0.0 if semi_hard else (counts.negatives > 0).double()
        cost = (1 - hardness) * counts.negatives + hardness * hardest
        return Bounds(0.0, 2 * margin * cost.mean())

    return TermValue(loss, bounds)
