"""What a model that has learnt nothing scores: the line that every figure is read against."""

from collections.abc import Mapping

from mmscale.config.loss import AnyTerm
from mmscale.loss.objective import named


def chance_loss(terms: tuple[AnyTerm, ...], measured: Mapping[str, float]) -> float | None:
    """The objective of a model that cannot tell the pairs of a batch apart.

    Args:
        terms: `loss.terms`.
        measured: What the update's record says of them: `StepRecord.terms`.

    Returns:
        None where the chance value of a term at work is not a function of the batch.
    """
    total = 0.0
    for name, term in named(terms).items():
        # A term of weight 0 is not measured.
        if name not in measured:
            continue
        if (chance := measured.get(f"{name}_chance")) is None:
            return None
        total += measured.get(f"{name}_weight", term.weight.last) * chance
    return total


def chance_recall(k: int, num_candidates: int, num_correct: float = 1) -> float:
    """Percent of queries with a correct candidate among k drawn blindly, without putting back.

    Args:
        k: Candidates looked at.
        num_candidates: Candidates in all.
        num_correct: Correct candidates of a query; an average over queries need not be whole.
    """
    missed = 1.0
    for drawn in range(min(k, num_candidates)):
        missed *= max(0.0, 1 - num_correct / (num_candidates - drawn))
    return 100 * (1 - missed)
