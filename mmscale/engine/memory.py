"""Bytes that a rank holds while it trains, predicted for each way of sharding.

Masters, moments and gradients are fp32 in every precision: matrix products alone run in bf16 or
fp16. What DeepSpeed holds is read from version 0.19.8 and held to by `tests/ranks/test_memory.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmscale.config.rules import needs_momentum
from mmscale.config.schema import Config
from mmscale.engine.footprint import Footprint, Weight
from mmscale.engine.optimizer import optimizer_kind
from mmscale.engine.plan import BatchPlan
from mmscale.loss.tiles import ACCELERATOR_SIDE as TILE_SIDE
from mmscale.loss.tiles import KEPT_BYTES
from mmscale.parallel.peers import BUCKET_BYTES

FP32 = 4
ID = 8
# DeepSpeed pads each flat group to this many elements a rank.
ALIGNMENT = 2
# Matrices of b x n that one direction of a loss without tiles holds at its height: logits,
# their exponentials, a masked copy, a gradient.
DENSE_MATRICES = 4


@dataclass(frozen=True)
class Sharding:
    """How the ranks divide the model.

    Attributes:
        name: For tables.
        stage: ZeRO's; 0: whole on every rank, through accelerate.
        zero: `zero_optimization` of the DeepSpeed file.
    """

    name: str
    stage: int
    zero: dict[str, Any]

    @property
    def offloads(self) -> bool:
        """Moments, masters and gradients lie in the host's memory."""
        return (self.zero.get("offload_optimizer") or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Holding:
    """Bytes of one kind on a rank.

    Attributes:
        name: What it is.
        bytes: Predicted.
        formula: How.
        host: In the host's memory instead of the device's.
    """

    name: str
    bytes: int
    formula: str
    host: bool = False


def holdings(
    seen: Footprint,
    sharding: Sharding,
    config: Config,
    plan: BatchPlan,
    queue: int,
    dtype: torch.dtype,
) -> list[Holding]:
    """Everything that a rank holds at the height of an update.

    Args:
        seen: The model.
        sharding: How it is divided.
        config: The run.
        plan: Its batch.
        queue: Slots of the queue of negatives.
        dtype: Of matrix products.
    """
    moments = len(optimizer_kind(config.optim, fused=False, sharded=sharding.stage > 0).moments)
    return [
        *(
            _sharded(seen, sharding, plan, dtype, moments)
            if sharding.stage
            else _replicated(seen, plan, moments)
        ),
        *_momentum(seen, sharding, config, plan),
        *_queue(config, queue),
        *activations(seen, config, plan, queue),
    ]


def _replicated(seen: Footprint, plan: BatchPlan, moments: int) -> Iterator[Holding]:
    trained, frozen = seen.numel(True), seen.numel(False)
    yield Holding("weights", FP32 * (trained + frozen) + seen.buffers, "4 x parameters + buffers")
    yield Holding("gradients", FP32 * trained, "4 x trained parameters")
    size = moments * FP32 * trained
    yield Holding("optimizer", size, f"{moments} moments x 4 x trained parameters")
    if plan.world > 1:
        yield Holding("buckets", _largest_bucket(seen), "the largest bucket of averaged gradients")


def _largest_bucket(seen: Footprint) -> int:
    """As `average_gradients` fills them."""
    largest = size = 0
    for weight in _trained(seen):
        size = FP32 * weight.numel + (0 if size > BUCKET_BYTES else size)
        largest = max(largest, size)
    return largest


def _sharded(
    seen: Footprint, sharding: Sharding, plan: BatchPlan, dtype: torch.dtype, moments: int
) -> Iterator[Holding]:
    stage, host = sharding.stage, sharding.offloads
    share = FP32 * (
        padded(seen, plan.world) // plan.world if stage < 3 else cut(_trained(seen), plan.world)
    )
    if stage < 3:
        whole = share * plan.world + FP32 * seen.numel(False) + seen.buffers
        yield Holding("weights", whole, "4 x parameters + buffers")
        yield Holding("masters", share, "4 x trained / ranks: a copy of this rank's", host)
    else:
        shards = FP32 * cut(seen.weights, plan.world) + seen.buffers
        kept, layer = _whole_in_stage_3(seen, sharding)
        yield Holding("weights", shards, "4 x parameters / ranks + buffers")
        yield Holding("whole weights", FP32 * kept, "4 x parameters of small tensors")
        yield Holding("gathered layer", FP32 * layer, "4 x the largest tensor")
        # DeepSpeed means to share one copy, but compares a device with its name.
        yield Holding("masters", share, "4 x trained / ranks: a copy of this rank's", host)
    yield Holding("gradients", *_gradients(seen, sharding, plan, share), host)
    size = moments * share
    yield Holding("optimizer", size, f"{moments} moments x 4 x trained / ranks", host)
    yield Holding("buckets", *_buckets(seen, sharding, dtype))


def _gradients(seen: Footprint, sharding: Sharding, plan: BatchPlan, share: int) -> tuple[int, str]:
    """Beyond what the buckets hold."""
    if sharding.stage == 3:
        return (
            (2 * share, "2 x 4 x trained / ranks")
            if sharding.offloads
            else (
                share,
                "4 x trained / ranks",
            )
        )
    if sharding.stage == 1 and plan.chunks > 1:
        return FP32 * seen.numel(True), "4 x trained: whole until the last chunk"
    touched = FP32 * _touched(seen, plan.world)
    if plan.chunks > 1:
        return 2 * touched, "2 x 4 x trained / ranks: of a chunk, and their sum"
    return touched, "4 x trained / ranks; a tensor that two ranks share counts whole"


def padded(seen: Footprint, world: int) -> int:
    """Trained elements with what ZeRO 1 and 2 add so that each group divides evenly."""
    groups: dict[str, int] = {}
    for weight in _trained(seen):
        group = str(weight.group)
        groups[group] = groups.get(group, 0) + weight.numel
    unit = ALIGNMENT * world
    return sum(-(-numel // unit) * unit for numel in groups.values())


def _touched(seen: Footprint, world: int) -> int:
    """Elements of the tensors that lie in a rank's part of ZeRO 1 and 2, of the fullest rank."""
    most = [0] * world
    groups: dict[str, list[int]] = {}
    for weight in _trained(seen):
        groups.setdefault(str(weight.group), []).append(weight.numel)
    for sizes in groups.values():
        unit = ALIGNMENT * world
        part, start = -(-sum(sizes) // unit) * unit // world, 0
        for size in sizes:
            for rank in range(start // part, min(world - 1, (start + size - 1) // part) + 1):
                most[rank] += size
            start += size
    return max(most)


def cut(weights: Sequence[Weight], world: int) -> int:
    """Elements of a rank's shards: every parameter is cut alone, rounded up."""
    return sum(-(-weight.numel // world) for weight in weights)


def _whole_in_stage_3(seen: Footprint, sharding: Sharding) -> tuple[int, int]:
    """Elements that stay whole on every rank, and of the largest layer that is gathered."""
    threshold = sharding.zero.get("stage3_param_persistence_threshold", 100_000)
    small = [weight.numel for weight in seen.weights if weight.numel <= threshold]
    large = [weight.numel for weight in seen.weights if weight.numel > threshold]
    return sum(small), max(large, default=0)


def _buckets(seen: Footprint, sharding: Sharding, dtype: torch.dtype) -> tuple[int, str]:
    elements = int(sharding.zero.get("reduce_bucket_size", 500_000_000))
    low = dtype.itemsize if any(w.sent_low for w in _trained(seen)) else 0
    sizes = [FP32] if dtype == torch.float32 else [low, FP32]
    copies = 2 if sharding.stage < 3 and sharding.zero.get("overlap_comm") else 1
    if sharding.stage < 3:
        # Filled in fp32, whatever they are sent in.
        sizes = [FP32 for size in sizes if size]
    return copies * elements * sum(sizes), (
        f"{copies} x reduce_bucket_size x ({' + '.join(map(str, sizes))})"
    )


def _momentum(
    seen: Footprint, sharding: Sharding, config: Config, plan: BatchPlan
) -> Iterator[Holding]:
    if not needs_momentum(config):
        return
    if sharding.stage == 3:
        size = FP32 * cut(seen.weights, plan.world) + seen.buffers
        yield Holding("momentum encoder", size, "4 x parameters / ranks + buffers")
    else:
        size = FP32 * seen.numel(True) + seen.buffers
        yield Holding("momentum encoder", size, "4 x trained parameters + buffers")


def _queue(config: Config, slots: int) -> Iterator[Holding]:
    if slots:
        row = 2 * FP32 * config.model.embed_dim + ID
        yield Holding("queue", 2 * slots * row, "2 x slots x (8 x width + 8): rows, and a copy")


def activations(seen: Footprint, config: Config, plan: BatchPlan, queue: int) -> Iterator[Holding]:
    """What the backward needs of the forward, and of the loss."""
    towers = sum(work.saved for work in seen.towers.values())
    features = sum(work.output for work in seen.towers.values()) * plan.chunks
    yield Holding(
        "tower activations",
        towers,
        f"kept by the forward of {seen.rows} rows, {seen.tokens} tokens",
    )
    held = features if plan.chunks > 1 else 0
    yield Holding(
        "head activations",
        seen.heads.saved + 2 * held,
        f"kept by the heads of {plan.rank_rows} rows"
        + ("; features and their gradient" if held else ""),
    )
    yield Holding("loss", *_loss(config, plan, queue))


def _loss(config: Config, plan: BatchPlan, slots: int) -> tuple[int, str]:
    rows, columns = plan.rank_rows, plan.global_rows
    width = 4 * FP32 * columns * config.model.embed_dim
    mined = config.negatives.mining.kind != "none"
    if not any(term.holds_logits(mined) for term in config.loss.terms):
        kept = min(KEPT_BYTES, FP32 * rows * columns)
        tiles = 2 * FP32 * min(TILE_SIDE, rows) * min(TILE_SIDE, columns)
        return width + kept + tiles, "gathered rows and gradients (16 n d) + kept tiles + 2 tiles"
    matrices = 2 * DENSE_MATRICES * FP32 * rows * (columns + slots)
    return width + matrices, f"gathered rows and gradients (16 n d) + {2 * DENSE_MATRICES} x 4 b n"


def _trained(seen: Footprint) -> list[Weight]:
    return [weight for weight in seen.weights if weight.group is not None]
