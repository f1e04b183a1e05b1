"""What a rank sends in one update, predicted collective by collective.

Counted as ring algorithms send: of V bytes over W ranks, an all-gather or a reduce-scatter sends
V (W - 1) / W from each rank, an all-reduce twice that. `tests/ranks/test_wire.py` compares it with
what two ranks really hand to torch.distributed.

Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", section 3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mmscale.config.rules import trained_terms
from mmscale.config.schema import Config
from mmscale.engine.footprint import Footprint, Weight
from mmscale.engine.memory import FP32, ID, Sharding, padded
from mmscale.engine.plan import BatchPlan

PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Transfer:
    """One kind of exchange.

    Attributes:
        name: What is exchanged.
        collective: `all-gather`, `reduce-scatter` or `all-reduce`.
        payload: Bytes of the whole, as every rank has it before or afterwards.
        times: How often in one update.
        formula: Of the payload.
        overlaps: The backward goes on meanwhile.
    """

    name: str
    collective: str
    payload: int
    times: int
    formula: str
    overlaps: bool = False

    def sent(self, world: int) -> int:
        """Bytes that each rank sends in one update."""
        return self.times * PASSES[self.collective] * self.payload * (world - 1) // world


def transfers(
    seen: Footprint,
    sharding: Sharding,
    config: Config,
    plan: BatchPlan,
    queue: int,
    dtype: torch.dtype,
) -> list[Transfer]:
    """Everything that is exchanged in one update; the arguments are those of `holdings`."""
    if plan.world == 1:
        return []
    return [
        *_embeddings(config, plan),
        *_queue(config, plan, queue),
        *_model(seen, sharding, plan, dtype),
    ]


def _embeddings(config: Config, plan: BatchPlan) -> Iterator[Transfer]:
    mined = config.negatives.mining.kind != "none"
    gathering = [term for term in trained_terms(config) if term.needs.gathers]
    in_tiles = [term for term in gathering if not term.holds_logits(mined)]
    # One product of tiles serves both directions, so that captions alone are gathered.
    whole = [side for term in gathering if term not in in_tiles for side in term.needs.gathers]
    sides = len({*whole, *("text" for _ in in_tiles)})
    columns, width = plan.global_rows, config.model.embed_dim
    yield Transfer("ids", "all-gather", ID * columns, 1, "8 n")
    if not config.negatives.gather or not sides:
        return
    rows, formula = FP32 * columns * width, "4 n d"
    yield Transfer("embeddings", "all-gather", rows, sides, formula)
    yield Transfer("embeddings, backward", "reduce-scatter", rows, sides, formula)
    if in_tiles:
        # Each column's maximum and sum, and the sum's gradient.
        yield Transfer("column sums", "all-reduce", FP32 * columns, 3, "4 n")


def _queue(config: Config, plan: BatchPlan, slots: int) -> Iterator[Transfer]:
    if slots:
        row = 2 * FP32 * config.model.embed_dim + ID
        yield Transfer("queue", "all-gather", plan.global_rows * row, 1, "n (8 d + 8)")


def _model(
    seen: Footprint, sharding: Sharding, plan: BatchPlan, dtype: torch.dtype
) -> Iterator[Transfer]:
    towers, rest = _parts(seen)
    if sharding.stage == 0:
        yield Transfer("gradients", "all-reduce", FP32 * seen.numel(True), 1, "4 x trained")
        return
    collective = "reduce-scatter" if sharding.stage == 3 else "all-reduce"
    # From stage 2 on every chunk's gradient is sent, in stage 1 their sum.
    times = plan.chunks if sharding.stage > 1 else 1
    overlaps = bool(sharding.zero.get("overlap_comm"))
    size = _sizes(dtype)
    yield Transfer("tower gradients", collective, size(towers), times, "trained", overlaps)
    yield Transfer("other gradients", collective, size(rest), 1, "trained", overlaps)
    if sharding.stage < 3:
        weights = FP32 * padded(seen, plan.world)
        yield Transfer("updated weights", "all-gather", weights, 1, "4 x trained")
        return
    chunks = plan.chunks
    # A chunk goes through the towers twice, and back once.
    passes = 3 * chunks if chunks > 1 else 2
    frozen = [weight for weight in seen.weights if weight.group is None]
    yield Transfer("tower weights", "all-gather", size(towers), passes, "trained, by pass")
    yield Transfer("other weights", "all-gather", size(rest), 2, "trained, by pass")
    if frozen:
        yield Transfer("frozen weights", "all-gather", size(frozen), chunks, "frozen, by pass")


def _parts(seen: Footprint) -> tuple[list[Weight], list[Weight]]:
    """Trained weights of the towers, and all others."""
    weights = [weight for weight in seen.weights if weight.group is not None]
    in_towers = [w.name.startswith(("vision.", "text.")) for w in weights]
    return (
        [w for w, inside in zip(weights, in_towers, strict=True) if inside],
        [w for w, inside in zip(weights, in_towers, strict=True) if not inside],
    )


def _sizes(dtype: torch.dtype) -> Callable[[list[Weight]], int]:
    """Bytes as DeepSpeed sends them: linear and convolution layers in autocast's dtype."""

    def size(weights: list[Weight]) -> int:
        return sum(w.numel * (dtype.itemsize if w.sent_low else FP32) for w in weights)

    return size
