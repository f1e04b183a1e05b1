"""What a model that has learnt nothing scores: the line that every figure is read against."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mmscale.config.loss import LossConfig
from mmscale.config.negatives import MiningConfig
from mmscale.config.ramp import Ramp
from mmscale.loss.mining import Mining
from mmscale.loss.reference import Facts, reference


def chance_loss(settings: Mapping[str, Any], num_ranks: int | None = None) -> float | None:
    """The objective of a model that cannot tell the pairs of a batch apart.

    Of distinct images, with the queue full of others and ramps at their ends; training logs each
    term's own chance value for the batch at hand. InfoNCE over n pairs is ln n.

    Args:
        settings: The resolved configuration as plain mappings.
        num_ranks: Processes; needed only where negatives stay on their rank.

    Returns:
        None where a term's chance value is not a function of the batch.
    """
    pairs = settings.get("train", {}).get("global_batch_size")
    negatives, model = settings.get("negatives", {}), settings.get("model", {})
    queue = negatives.get("queue") or {}
    remembered = queue.get("size", 0)
    try:
        terms = LossConfig.model_validate(settings.get("loss", {})).terms
        mining = Mining.of(MiningConfig.model_validate(negatives.get("mining") or {}), _end)
    except ValidationError:
        return None
    if not pairs or "loss" not in settings or not isinstance(remembered, int):
        return None
    if not negatives.get("gather", True):
        if num_ranks is None:
            return None
        pairs //= num_ranks
    remembered = round(_end(Ramp.parse(queue.get("share", 1))) * remembered)
    classes = (model.get("fusion") or {}).get("classes")
    facts = Facts.expected(pairs, remembered, model.get("embed_dim", 1), classes)
    total = 0.0
    for term in terms:
        chance = reference(term, facts, _end, mining).chance
        if chance is None:
            return None
        total += _end(term.weight) * chance
    return total


def _end(ramp: Ramp) -> float:
    return ramp.last


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
