"""Bytes that a rank holds while it trains, predicted for each way of sharding.

Masters, moments and gradients are fp32 in every precision: matrix products alone run in bf16 or
fp16. Padding is left out, a few elements a tensor and group. `tests/ranks/test_memory.py` finds two
real ranks within 10 % of each figure, with DeepSpeed 0.19.8.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mmscale.config.rules import keeps_start, needs_momentum
from mmscale.config.schema import Config
from mmscale.config.taught import L2StartTerm
from mmscale.engine.footprint import Footprint, Weight
from mmscale.engine.optimizer import optimizer_kind
from mmscale.engine.plan import BatchPlan
from mmscale.loss.strips import ACCELERATOR_LOGITS as STRIP_LOGITS
from mmscale.loss.tiles import ACCELERATOR_SIDE as TILE_SIDE
from mmscale.loss.tiles import KEPT_BYTES

FP32 = 4
ID = 8
# As large as a strip of logits, at the height of a loss in strips: logits and what is derived from
# them, masks, what autograd keeps of these, and their gradients.
STRIP_MATRICES = 16


@dataclass(frozen=True)
class Sharding:
    """How the ranks divide the model.

    Attributes:
        name: For tables.
        stage: ZeRO's; 0: engine.kind=accelerate, which is FSDP2 on several ranks.
        zero: `zero_optimization` of the DeepSpeed file.
    """

    name: str
    stage: int
    zero: dict[str, Any]

    @property
    def offloads(self) -> bool:
        """Moments, masters and gradients lie in the host's memory."""
        return (self.zero.get("offload_optimizer") or {}).get("device", "none") != "none"


UNZEROED = Sharding("accelerate", 0, {})
# What grows with the rows that are forwarded at once.
TOWER_ACTIVATIONS = "tower activations"


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


@dataclass(frozen=True)
class Workload:
    """What a rank has to hold, compute and send.

    Attributes:
        seen: The model.
        config: The run.
        plan: Its batch.
        queue: Slots of the queue of negatives.
        dtype: Of matrix products.
        teachers: Bytes of each frozen teacher by name; None where its size is not known here.
    """

    seen: Footprint
    config: Config
    plan: BatchPlan
    queue: int
    dtype: torch.dtype
    teachers: Mapping[str, int | None] = field(default_factory=dict)


def holdings(work: Workload, sharding: Sharding) -> list[Holding]:
    """Everything that a rank holds at the height of an update."""
    return [
        *(_sharded(work, sharding) if sharding.stage else _without_zero(work)),
        *_momentum(work, sharding),
        *_frozen_models(work),
        *_queue(work),
        *activations(work),
    ]


def _moments(work: Workload, sharding: Sharding) -> int:
    optim, zero = work.config.optim, sharding.stage > 0
    cut = zero or work.plan.world > 1
    return len(optimizer_kind(optim, fused=False, sharded=cut, flat=zero).moments)


def _without_zero(work: Workload) -> Iterator[Holding]:
    seen, moments, world = work.seen, _moments(work, UNZEROED), work.plan.world
    trained, frozen = seen.numel(True), seen.numel(False)
    share, by = FP32 * trained // world, " / ranks" if world > 1 else ""
    weights = share + FP32 * frozen + seen.buffers
    if world == 1:
        yield Holding("weights", weights, "4 x parameters + buffers")
    else:
        yield Holding("weights", weights, "4 x (trained / ranks + frozen) + buffers")
        yield Holding("whole weights", *_whole_in_fsdp(work))
    if world > 1 and work.plan.chunks > 1:
        formula = "4 x trained: whole until the last chunk"
        yield Holding("gradients", FP32 * trained, formula)
    else:
        yield Holding("gradients", share, f"4 x trained{by}")
    yield Holding("optimizer", moments * share, f"{moments} moments x 4 x trained{by}")
    if world > 1:
        blocks, rest = fsdp_units(seen)
        largest = FP32 * max([*blocks, rest])
        yield Holding("buckets", largest, "4 x the largest block, or all outside of blocks")


def fsdp_units(seen: Footprint) -> tuple[list[int], int]:
    """Trained elements of each block that FSDP2 gathers as one, and of all outside of blocks."""
    blocks: dict[int, int] = {}
    for weight in _trained(seen):
        if weight.block is not None:
            blocks[weight.block] = blocks.get(weight.block, 0) + weight.numel
    return list(blocks.values()), seen.numel(True) - sum(blocks.values())


def _whole_in_fsdp(work: Workload) -> tuple[int, str]:
    size, (blocks, rest) = work.dtype.itemsize, fsdp_units(work.seen)
    if work.config.engine.reshard_after_forward:
        # The next one is gathered while the last one computes.
        most = sum(sorted(blocks)[-2:])
        return size * (rest + most), f"{size} x (two blocks, and all outside of blocks)"
    return size * work.seen.numel(True), f"{size} x trained parameters"


def _sharded(work: Workload, sharding: Sharding) -> Iterator[Holding]:
    seen, world, host = work.seen, work.plan.world, sharding.offloads
    trained, frozen, moments = seen.numel(True), seen.numel(False), _moments(work, sharding)
    share = FP32 * trained // world
    if sharding.stage < 3:
        whole = FP32 * (trained + frozen) + seen.buffers
        yield Holding("weights", whole, "4 x parameters + buffers")
    else:
        shards = FP32 * (trained + frozen) // world + seen.buffers
        kept, layer = _whole_in_stage_3(seen, sharding)
        yield Holding("weights", shards, "4 x parameters / ranks + buffers")
        yield Holding("whole weights", FP32 * kept, "4 x parameters of small tensors")
        yield Holding("gathered layer", FP32 * layer, "4 x the largest tensor")
    # In stage 3 DeepSpeed means to share one copy, but compares a device with its name.
    yield Holding("masters", share, "4 x trained / ranks: a copy of this rank's", host)
    yield Holding("gradients", *_gradients(work, sharding, share), host)
    yield Holding("optimizer", moments * share, f"{moments} moments x 4 x trained / ranks", host)
    yield Holding("buckets", *_buckets(work, sharding))


def _gradients(work: Workload, sharding: Sharding, share: int) -> tuple[int, str]:
    """Beyond what the buckets hold."""
    if sharding.stage == 3:
        formula = "4 x trained / ranks"
        return (2 * share, f"2 x {formula}") if sharding.offloads else (share, formula)
    if sharding.stage == 1 and work.plan.chunks > 1:
        return FP32 * work.seen.numel(True), "4 x trained: whole until the last chunk"
    touched = FP32 * _touched(work.seen, work.plan.world)
    if work.plan.chunks > 1:
        return 2 * touched, "2 x 4 x trained / ranks: of a chunk, and their sum"
    return touched, "4 x trained / ranks; a tensor that two ranks share counts whole"


def _touched(seen: Footprint, world: int) -> int:
    """Elements of the tensors that lie in a rank's part of ZeRO 1 and 2, of the fullest rank."""
    most = [0] * world
    groups: dict[str, list[int]] = {}
    for weight in _trained(seen):
        groups.setdefault(str(weight.group), []).append(weight.numel)
    for sizes in groups.values():
        part, start = -(-sum(sizes) // world), 0
        for size in sizes:
            for rank in range(start // part, (start + size - 1) // part + 1):
                most[rank] += size
            start += size
    return max(most)


def _whole_in_stage_3(seen: Footprint, sharding: Sharding) -> tuple[int, int]:
    """Elements that stay whole on every rank, and of the largest layer that is gathered."""
    threshold = sharding.zero.get("stage3_param_persistence_threshold", 100_000)
    small = [weight.numel for weight in seen.weights if weight.numel <= threshold]
    large = [weight.numel for weight in seen.weights if weight.numel > threshold]
    return sum(small), max(large, default=0)


def _buckets(work: Workload, sharding: Sharding) -> tuple[int, str]:
    elements = int(sharding.zero.get("reduce_bucket_size", 500_000_000))
    low = any(weight.sent_low for weight in _trained(work.seen))
    sizes = [FP32] if work.dtype == torch.float32 else [work.dtype.itemsize * low, FP32]
    copies = 2 if sharding.stage < 3 and sharding.zero.get("overlap_comm") else 1
    if sharding.stage < 3:
        # Filled in fp32, whatever they are sent in.
        sizes = [FP32 for size in sizes if size]
    return copies * elements * sum(sizes), (
        f"{copies} x reduce_bucket_size x ({' + '.join(map(str, sizes))})"
    )


def _momentum(work: Workload, sharding: Sharding) -> Iterator[Holding]:
    seen = work.seen
    if not needs_momentum(work.config):
        return
    if sharding.stage == 3:
        size = FP32 * (seen.numel(True) + seen.numel(False)) // work.plan.world + seen.buffers
        yield Holding("momentum encoder", size, "4 x parameters / ranks + buffers")
    elif sharding.stage == 0 and work.plan.world > 1:
        size = FP32 * seen.numel(True) // work.plan.world + seen.buffers
        yield Holding("momentum encoder", size, "4 x trained parameters / ranks + buffers")
    else:
        size = FP32 * seen.numel(True) + seen.buffers
        yield Holding("momentum encoder", size, "4 x trained parameters + buffers")


def _frozen_models(work: Workload) -> Iterator[Holding]:
    """Teachers and the run's start, whole on every rank."""
    seen = work.seen
    if work.teachers:
        unknown = [name for name, size in work.teachers.items() if size is None]
        without = f"; without {', '.join(unknown)}" if unknown else ""
        size = sum(size for size in work.teachers.values() if size is not None)
        yield Holding("teachers", size, f"4 x their parameters + buffers{without}")
    if keeps_start(work.config):
        size = FP32 * (seen.numel(True) + seen.numel(False)) + seen.buffers
        yield Holding("start", size, "4 x parameters + buffers: the weights it began with")
    if any(isinstance(term, L2StartTerm) for term in work.config.loss.terms):
        size = FP32 * seen.numel(True) // work.plan.world
        yield Holding("pull to the start", size, "4 x trained parameters / ranks")


def _queue(work: Workload) -> Iterator[Holding]:
    if work.queue:
        row = 2 * FP32 * work.config.model.embed_dim + ID
        size = 2 * work.queue * row
        yield Holding("queue", size, "2 x slots x (8 x width + 8): rows, and a copy")


def activations(work: Workload) -> Iterator[Holding]:
    """What the backward needs of the forward, and of the loss."""
    seen, plan = work.seen, work.plan
    towers = sum(part.saved for part in seen.towers.values())
    features = sum(part.output for part in seen.towers.values()) * seen.passed // seen.rows
    yield Holding(
        TOWER_ACTIVATIONS,
        towers,
        f"kept by the forward of {seen.rows} rows, {seen.tokens} tokens",
    )
    held = features if plan.chunks > 1 else 0
    yield Holding(
        "head activations",
        seen.heads.saved + 2 * held,
        f"kept by the heads of {seen.passed} rows"
        + ("; features and their gradient" if held else ""),
    )
    yield Holding("loss", *_loss(work.config, plan, work.queue))


def _loss(config: Config, plan: BatchPlan, slots: int) -> tuple[int, str]:
    rows, columns = plan.rank_rows, plan.global_rows
    width = 4 * FP32 * columns * config.model.embed_dim
    mined = config.negatives.mining.kind != "none"
    if not any(term.contrasts_in(mined) == "strips" for term in config.loss.terms):
        kept = min(KEPT_BYTES, FP32 * rows * columns)
        tiles = 2 * FP32 * min(TILE_SIDE, rows) * min(TILE_SIDE, columns)
        return width + kept + tiles, "gathered rows and gradients (16 n d) + kept tiles + 2 tiles"
    strip = FP32 * min(rows * (columns + slots), STRIP_LOGITS)
    formula = (
        f"gathered rows and gradients (16 n d) + {STRIP_MATRICES} x 4 x (b (n + k), or a strip)"
    )
    return width + STRIP_MATRICES * strip, formula


def _trained(seen: Footprint) -> list[Weight]:
    return [weight for weight in seen.weights if weight.group is not None]
