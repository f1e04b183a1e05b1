"""Every set that a run is evaluated on, one after the other, by the same code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mmscale.config.evaluation import MAIN, logged, setting_of
from mmscale.config.schema import Config
from mmscale.contracts import Peers
from mmscale.diagnostics.pairs import Pairs
from mmscale.engine.encode import Call, Encoder
from mmscale.errors import DataError
from mmscale.evaluation.classes import ClassSet, class_figures, classify
from mmscale.evaluation.encoded import EvalSet
from mmscale.evaluation.retrieval import evaluate


@dataclass(frozen=True)
class Evaluated:
    """What was found on a set: its figures by name; of pairs, their embeddings."""

    figures: dict[str, float]
    pairs: Pairs | None = None


def evaluate_sets(
    config: Config,
    call: Call,
    device: torch.device,
    sets: Mapping[str, EvalSet],
    peers: Peers,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Evaluated]:
    """Each set's figures, the same on every rank. Collective.

    Args:
        config: The run.
        call: Forward of a model in evaluation mode.
        device: Where it computes.
        sets: By name, in the order in which they are evaluated.
        peers: All ranks.
        progress: Called as a set's images are encoded, with how many and of how many.

    Raises:
        DataError: A set is not what its manifest says, or too much of it cannot be decoded.
        HaltError: The embeddings are not finite.
    """
    found = {}
    for name, held_out in sets.items():
        try:
            if isinstance(held_out, ClassSet):
                encoder = Encoder.of(config, call, device, held_out.spec, peers)
                taken = classify(encoder, held_out, progress)
                count = len(held_out.classes)
                found[name] = Evaluated(class_figures(taken, count, peers))
            else:
                found[name] = Evaluated(*evaluate(config, call, device, held_out, peers, progress))
        except DataError as error:
            is_told = name == MAIN or str(error).startswith("eval.sets.")
            raise (error if is_told else DataError(f"{setting_of(name)}: {error}")) from error
    return found


def as_logged(evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
    """The figures of all sets as they are logged: `eval/mean`, `eval/coco/mean`."""
    return {
        logged(name, figure): value
        for name, found in evaluated.items()
        for figure, value in found.figures.items()
    }
