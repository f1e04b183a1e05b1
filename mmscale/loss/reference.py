"""What a term is at best and what it is for a model that tells nothing apart, from counts alone.

So "loss 4.85" explains itself: with 128 pairs it is ln 128, chance. Training logs both beside each
term, the report draws them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config import loss as settings
from mmscale.config.loss import AnyTerm
from mmscale.config.needs import MINED_TERMS
from mmscale.config.ramp import Ramp
from mmscale.contracts import LossInput, Peers
from mmscale.loss.mining import Mining

# One match to a hard caption and a hard image.
USUAL_MATCHES = 1 / 3


class Reference(NamedTuple):
    """Floor and chance value of a term; None where it has none, or none that counts tell."""

    floor: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Facts:
    """What the values depend on, over the rows of all ranks.

    Attributes:
        num_rows: How many rows that are.
        positives: Columns of each row's own id in the batch.
        negatives: What columns of other ids count together, remembered ones included.
        remembered: Remembered columns of the row's own id.
        width: Shared embedding width.
        scale: 1 / temperature.
        classes: Classes of the classification head.
        matches: Share of the matching pairs that match.
    """

    num_rows: int
    positives: Float[Tensor, " n"]
    negatives: Float[Tensor, " n"]
    remembered: Float[Tensor, " n"]
    width: int
    scale: float
    classes: int | None = None
    matches: float = USUAL_MATCHES

    @classmethod
    def of(cls, rows: LossInput, peers: Peers) -> "Facts":
        """Of one global batch. Collective."""
        ids = peers.columns(rows.ids)
        positives, remembered = _count_in(ids, ids), torch.zeros_like(ids).double()
        slots = 0
        if rows.bank is not None:
            filled = rows.bank.ids[rows.bank.ids >= 0]
            remembered, slots = _count_in(ids, filled), len(filled)
        matches = USUAL_MATCHES
        if rows.matching_targets is not None:
            targets = rows.matching_targets.double()
            total = peers.total(torch.stack([targets.sum(), targets.new_tensor(len(targets))]))
            matches = float(total[0] / total[1])
        return cls(
            len(ids),
            positives,
            len(ids) + slots - positives - remembered,
            remembered,
            rows.image.unit.shape[1],
            float(rows.scale.detach()),
            None if rows.class_logits is None else rows.class_logits.shape[1],
            matches,
        )


def reference(
    term: AnyTerm, facts: Facts, at: Callable[[Ramp], float], mining: Mining | None = None
) -> Reference:
    """Floor and chance of a term.

    Args:
        term: Its settings.
        facts: The batch.
        at: A ramp's value now.
        mining: Which negatives count, for the terms that ask.
    """
    if mining is None or term.kind not in MINED_TERMS:
        return _reference(term, facts, at)
    mined = replace(facts, negatives=mining.effective(facts.negatives))
    found = _reference(term, mined, at)
    # How many lie behind the pair of a model that knows nothing is chance itself.
    return found if mining.kind == "hard" else Reference(found.floor)


def _reference(term: AnyTerm, facts: Facts, at: Callable[[Ramp], float]) -> Reference:
    num_rows, positives, negatives = facts.num_rows, facts.positives, facts.negatives
    match term:
        case settings.InfoNCETerm():
            return _cross_entropy(positives, negatives, at(term.label_smoothing))
        case settings.SigLIPTerm():
            return Reference(0.0, _best_constant(positives, negatives))
        case settings.DCLTerm():
            return Reference(None, _log_mean(negatives))
        case settings.HardNegativeTerm(alpha=alpha):
            floor = _log_mean(alpha * positives) if alpha else None
            return Reference(floor, _log_mean(alpha * positives + negatives))
        case settings.NTXentTerm():
            return Reference(0.0, _log_mean(1 + 2 * (num_rows - positives)))
        case settings.SupConTerm():
            factor, floor = _supcon_factor(term, facts), _log_mean(2 * positives - 1)
            return Reference(factor * floor, factor * math.log(2 * num_rows - 1))
        case settings.HingeTerm(margin=margin, semi_hard=semi_hard):
            hardness = at(term.hardness)
            hardest = torch.zeros_like(negatives) if semi_hard else (negatives > 0).double()
            cost = (1 - hardness) * negatives + hardness * hardest
            return Reference(0.0, 2 * margin * float(cost.mean()))
        case settings.SpectralTerm(mu=mu):
            return Reference(-2.0, (min(1.0, mu) ** 2 - 2 * min(1.0, mu)) / mu)
        case settings.DecorrelationTerm():
            return Reference(max(0.0, facts.width / max(num_rows - 1, 1) - 1))
        case settings.AlignmentTerm():
            return Reference(0.0, 2.0)
        case settings.UniformityTerm(t=t):
            # Squared distances sum to at most 2 n^2.
            pairs = float((num_rows - positives).mean())
            return Reference(-2 * t * num_rows / pairs if pairs else 0.0, 0.0)
        case settings.PrototypesTerm(clusters=clusters):
            return Reference(0.0, sum(map(math.log, clusters)) / len(clusters))
        case settings.DistillationTerm():
            return Reference(None, _log_mean(positives + negatives + facts.remembered))
        case settings.MatchingTerm():
            share = torch.tensor([facts.matches, 1 - facts.matches], dtype=torch.float64)
            return Reference(0.0, float(torch.special.entr(share).sum()))
        case settings.ClassificationTerm():
            return Reference(0.0, math.log(facts.classes) if facts.classes else None)
        case _:
            return Reference(0.0)


def _cross_entropy(
    positives: Float[Tensor, " n"], negatives: Float[Tensor, " n"], smoothing: float
) -> Reference:
    """The entropy of the smoothed targets, and that of no opinion."""
    everything = positives + negatives
    spread = smoothing / everything
    own = (1 - smoothing) / positives + spread
    entropy = positives * torch.special.entr(own) + negatives * torch.special.entr(spread)
    return Reference(float(entropy.mean()), _log_mean(everything))


def _best_constant(positives: Float[Tensor, " n"], negatives: Float[Tensor, " n"]) -> float:
    """Binary cross-entropy of the best answer that is the same for every pair, a row."""
    everything = (positives + negatives).mean()
    share = positives.mean() / everything
    return float(everything * (torch.special.entr(share) + torch.special.entr(1 - share)))


def _log_mean(counts: Float[Tensor, " n"]) -> float:
    """Mean log of the rows' counts; a row that counts none adds nothing."""
    return float(counts.where(counts > 0, torch.ones_like(counts)).log().mean())


def _supcon_factor(term: settings.SupConTerm, facts: Facts) -> float:
    if term.base_temperature is None:
        return 1.0
    if term.temperature is not None:
        return term.temperature / term.base_temperature
    return 1 / (facts.scale * term.base_temperature)


def _count_in(ids: Int64[Tensor, " n"], among: Int64[Tensor, " m"]) -> Float[Tensor, " n"]:
    """How often each id occurs among others, without an [n m] table."""
    ordered = among.sort().values
    first, last = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
    return (last - first).double()
