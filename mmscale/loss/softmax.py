"""Softmax losses: InfoNCE's kin, across modalities and over both as views of one thing.

Images are contrasted with captions and captions with images (`dcl`, `hn_nce`: the mean of both
directions), or every row with all rows of both modalities (`ntxent`, `supcon`).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.loss import DCLTerm, HardNegativeTerm, NTXentTerm, SupConTerm
from mmscale.loss.contrast import (
    Contrast,
    PairRows,
    directions,
    discounted,
    logsumexp_where,
    mean_where,
    two_views,
)
from mmscale.loss.mining import Mining
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Counts, Given, TermValue, log_mean, term


def dcl(
    pairs: PairRows, scale: Float[Tensor, "1"], *, mining: Mining | None = None
) -> Float[Tensor, ""]:
    """Decoupled contrastive loss across modalities: InfoNCE without positives in the denominator.

    For each image i: log sum_{j: id_j != id_i} exp(s x_i.y_j) - mean_{p: id_p = id_i}(s x_i.y_p).
    Unbounded below. A row without a negative adds nothing.

    Source: Yeh et al. 2022, "Decoupled Contrastive Learning" (arXiv 2110.06848), equation 6,
        without its negatives of the same modality.
    """

    def sums(way: Contrast, scale: Float[Tensor, "1"]) -> Sums:
        way = mining(way) if mining else way
        logits = scale * way.similarity
        total = logsumexp_where(discounted(logits, way), way.negative)
        loss = total - mean_where(logits, way.positive)
        return (loss.where(total > -torch.inf, torch.zeros_like(loss)).sum(),)

    return _mean_of_directions(sums, pairs, scale)


def hn_nce(
    pairs: PairRows, scale: Float[Tensor, "1"], *, alpha: float = 1.0, beta: float = 0.5
) -> Float[Tensor, ""]:
    """InfoNCE whose negatives weigh more the harder they are.

    For each image i, with l = s x.y, its positives p and its m negatives j:
    log(alpha sum_p e^{l_ip} + sum_j w_ij e^{l_ij}) - mean_p l_ip, w_ij = m softmax_j(beta l_ij).
    alpha = 1 and beta = 0 is InfoNCE; alpha = 0 and beta = 0 is DCL. A row without negatives adds
    nothing where alpha = 0.

    Source: Radenovic et al. 2023, "Filtering, Distillation, and Hard Negatives for Vision-Language
        Pre-Training" (arXiv 2301.02280), section 3.3.
    """

    def sums(way: Contrast, scale: Float[Tensor, "1"]) -> Sums:
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
        return (loss.where(total > -torch.inf, torch.zeros_like(loss)).sum(),)

    return _mean_of_directions(sums, pairs, scale)


def ntxent(pairs: PairRows, scale: Float[Tensor, "1"]) -> Float[Tensor, ""]:
    """SimCLR's loss: each of the 2n rows must find its partner among all rows of other ids.

    Mean over the rows z_i of log(e^{s z_i.z_p} + sum_{j: id_j != id_i} e^{s z_i.z_j}) - s z_i.z_p.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
        Representations" (arXiv 2002.05709), equation 1.
    """

    def sums(way: Contrast, scale: Float[Tensor, "1"]) -> Sums:
        logits, pair = scale * way.similarity, scale * way.pair
        return ((logsumexp_where(logits, way.negative).logaddexp(pair) - pair).sum(),)

    (total,) = sum_over_rows(sums, [two_views(pairs)], scale)
    return total / (2 * len(pairs.ids))


def supcon(
    pairs: PairRows, scale: Float[Tensor, "1"], *, base_temperature: float | None = None
) -> Float[Tensor, ""]:
    """Supervised contrastive loss: each of the 2n rows must find all rows of its id.

    Mean over the rows z_i of logsumexp_{j != i}(s z_i.z_j) - mean_{p != i: id_p = id_i}(s z_i.z_p),
    times temperature / base_temperature where one is given.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning" (arXiv 2004.11362), equation 2.
    """

    def sums(way: Contrast, scale: Float[Tensor, "1"]) -> Sums:
        logits, others = scale * way.similarity, way.positive | way.negative
        return ((logsumexp_where(logits, others) - mean_where(logits, way.positive)).sum(),)

    (total,) = sum_over_rows(sums, [two_views(pairs)], scale)
    factor = 1.0 if base_temperature is None else 1 / (scale.squeeze() * base_temperature)
    return factor * (total / (2 * len(pairs.ids)))


def _mean_of_directions(
    sums: Callable[..., Sums], pairs: PairRows, scale: Float[Tensor, "1"]
) -> Float[Tensor, ""]:
    first, second = (sum_over_rows(sums, [way], scale)[0] for way in directions(pairs))
    return (first / len(pairs.ids) + second / len(pairs.ids)) / 2


@term(DCLTerm)
def _dcl(settings: DCLTerm, given: Given) -> TermValue:
    loss = dcl(given.pairs, given.scale(settings.temperature), mining=given.mining)
    return TermValue(loss, given.of_mined(lambda counts: Bounds(None, log_mean(counts.negatives))))


@term(HardNegativeTerm)
def _hn_nce(settings: HardNegativeTerm, given: Given) -> TermValue:
    alpha, scale = settings.alpha, given.scale(settings.temperature)
    loss = hn_nce(given.pairs, scale, alpha=alpha, beta=given.at(settings.beta))

    def bounds(counts: Counts) -> Bounds:
        floor = log_mean(alpha * counts.positives) if alpha else None
        return Bounds(floor, log_mean(alpha * counts.positives + counts.negatives))

    return TermValue(loss, bounds)


@term(NTXentTerm)
def _ntxent(settings: NTXentTerm, given: Given) -> TermValue:
    def bounds(counts: Counts) -> Bounds:
        return Bounds(0.0, log_mean(1 + 2 * (len(counts) - counts.positives)))

    return TermValue(ntxent(given.pairs, given.scale(settings.temperature)), bounds)


@term(SupConTerm)
def _supcon(settings: SupConTerm, given: Given) -> TermValue:
    scale, base = given.scale(settings.temperature), settings.base_temperature
    loss = supcon(given.pairs, scale, base_temperature=base)

    def bounds(counts: Counts) -> Bounds:
        factor = 1.0 if base is None else 1 / (scale.detach().double().squeeze() * base)
        floor, chance = log_mean(2 * counts.positives - 1), math.log(2 * len(counts) - 1)
        return Bounds(factor * floor, factor * chance)

    return TermValue(loss, bounds)
