"""What a model that has learnt nothing scores: the line that every figure is read against."""

import math
from collections.abc import Mapping
from typing import Any


def chance_loss(settings: Mapping[str, Any], num_ranks: int | None = None) -> float | None:
    """Loss in nats of a model that cannot tell the pairs of a batch apart.

    InfoNCE over n pairs is ln n at chance (each pair its own image).

    Args:
        settings: The resolved configuration as plain mappings.
        num_ranks: Processes; needed only where negatives stay on their rank.

    Returns:
        None where the objective holds a term whose chance level is not a function of the batch.
    """
    pairs = settings.get("train", {}).get("global_batch_size")
    terms = settings.get("loss", {}).get("terms", ())
    if not pairs or not terms or any(term.get("kind") != "infonce" for term in terms):
        return None
    if not settings.get("negatives", {}).get("gather", True):
        if num_ranks is None:
            return None
        pairs = pairs / num_ranks
    return float(sum(term.get("weight", 1.0) for term in terms)) * math.log(pairs)


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
