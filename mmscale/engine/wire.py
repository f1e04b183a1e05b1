"""What a rank sends in one update, and how much of many GPUs' speed that leaves: predictions.

Counted as ring algorithms send: of V bytes over W ranks, an all-gather or a reduce-scatter sends
V (W - 1) / W from each rank, an all-reduce twice that. `tests/ranks/test_memory.py` compares it
with what two ranks really hand to torch.distributed. A step takes the time of its products at the
cluster's utilisation of the peak, plus that of every exchange which the backward does not hide.
Latencies, stragglers and the reading of data are left out: real efficiency lies below.

Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", section 3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mmscale.config.cluster import ClusterConfig
from mmscale.config.rules import trained_terms
from mmscale.config.schema import Config
from mmscale.config.taught import TaughtTerm
from mmscale.config.term import BOTH
from mmscale.engine.footprint import Footprint, Weight
from mmscale.engine.memory import FP32, ID, Sharding, Workload, fsdp_units
from mmscale.engine.plan import BatchPlan

GPUS = (8, 16, 32, 64, 128, 256, 512)
FORMULA = (
    "compute / (compute + exposed); compute = FLOPs a rank / (peak x utilisation); exposed = bytes "
    "sent that the backward does not hide / (bandwidth x link share); bandwidth of a ring: a GPU's "
    "link in one node, else the smaller of that and a node's"
)
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


def transfers(work: Workload, sharding: Sharding) -> list[Transfer]:
    """Everything that is exchanged in one update."""
    if work.plan.world == 1:
        return []
    return [
        *_embeddings(work.config, work.plan),
        *_queue(work.config, work.plan, work.queue),
        *_model(work, sharding),
    ]


def _embeddings(config: Config, plan: BatchPlan) -> Iterator[Transfer]:
    mined = config.negatives.mining.kind != "none"
    gathering = [term for term in trained_terms(config) if term.needs.gathers]
    in_tiles = [term for term in gathering if term.contrasts_in(mined) == "tiles"]
    # One product of tiles serves both directions, so that captions alone are gathered.
    whole = [side for term in gathering if term not in in_tiles for side in term.needs.gathers]
    if any(isinstance(t, TaughtTerm) and t.form == "affinity" for t in trained_terms(config)):
        whole += BOTH
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


def _model(work: Workload, sharding: Sharding) -> Iterator[Transfer]:
    seen, chunks = work.seen, work.seen.chunks
    towers, rest = _parts(seen)
    if sharding.stage == 0:
        yield from _fsdp(work)
        return
    collective = "reduce-scatter" if sharding.stage == 3 else "all-reduce"
    # From stage 2 on every chunk's gradient is sent, in stage 1 their sum.
    times = chunks if sharding.stage > 1 else 1
    overlaps = bool(sharding.zero.get("overlap_comm"))
    size = _sizes(work.dtype)
    yield Transfer("tower gradients", collective, size(towers), times, "trained", overlaps)
    yield Transfer("other gradients", collective, size(rest), 1, "trained", overlaps)
    if sharding.stage < 3:
        weights = FP32 * seen.numel(True)
        yield Transfer("updated weights", "all-gather", weights, 1, "4 x trained")
        return
    # A chunk goes through the towers twice, and back once.
    passes = 3 * chunks if chunks > 1 else 2
    frozen = [weight for weight in seen.weights if weight.group is None]
    yield Transfer("tower weights", "all-gather", size(towers), passes, "trained, by pass")
    yield Transfer("other weights", "all-gather", size(rest), 2, "trained, by pass")
    if frozen:
        yield Transfer("frozen weights", "all-gather", size(frozen), chunks, "frozen, by pass")


def _fsdp(work: Workload) -> Iterator[Transfer]:
    """What FSDP2 sends: weights in the dtype of products, and gradients in fp32."""
    size, chunks = work.dtype.itemsize, work.seen.chunks
    blocks, rest = fsdp_units(work.seen)
    inside = size * sum(blocks)
    anew = work.config.engine.reshard_after_forward
    # A chunk goes through the towers twice, and back once.
    passes = (3 * chunks if chunks > 1 else 2) if anew else 1
    formula = f"{size} x trained in blocks" + (", by pass" if anew else "")
    yield Transfer("weights of blocks", "all-gather", inside, passes, formula, True)
    yield Transfer("other weights", "all-gather", size * rest, 1, f"{size} x others trained")
    trained = FP32 * work.seen.numel(True)
    yield Transfer("gradients", "reduce-scatter", trained, 1, "4 x trained", True)


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


@dataclass(frozen=True)
class StepTime:
    """One update at one number of GPUs.

    Attributes:
        gpus: In all.
        global_rows: Pairs of a batch.
        compute: Seconds of products.
        exposed: Seconds of exchanges that nothing hides.
    """

    gpus: int
    global_rows: int
    compute: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Of the whole update."""
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the speed that as many lone GPUs would have together."""
        return self.compute / self.seconds

    @property
    def samples_per_second(self) -> float:
        """Pairs a second over all GPUs."""
        return self.global_rows / self.seconds


def predict(work: Workload, sharding: Sharding, precision: str, cluster: ClusterConfig) -> StepTime:
    """One update on as many GPUs of the cluster as the batch has ranks."""
    plan = work.plan
    speed = 1e12 * getattr(cluster.peak_tflops, precision) * cluster.utilisation
    forward, both = rank_flops(work.seen, work.config, plan)
    sends = transfers(work, sharding)
    link = 1e9 * bandwidth(cluster, plan.world) * cluster.link_share
    hidden = _seconds([t for t in sends if t.overlaps], plan.world, link)
    open_ = _seconds([t for t in sends if not t.overlaps], plan.world, link)
    backward = (both - forward) / speed
    exposed = open_ + max(0.0, hidden - backward)
    again = forward if plan.chunks > 1 else 0
    return StepTime(plan.world, plan.global_rows, (both + again) / speed, exposed)


def rank_flops(seen: Footprint, config: Config, plan: BatchPlan) -> tuple[int, int]:
    """FLOPs of a rank's update: of its forward, and with the backward; recomputation not counted.

    The logits count as four products of b x n x d: forward, and a gradient to either side, of
    which the tiled loss computes the first twice.
    """
    towers = seen.towers.values()
    rows, columns = plan.rank_rows, plan.global_rows
    product = 2 * rows * columns * config.model.embed_dim
    forward = sum(work.forward for work in towers) * seen.passed // seen.rows
    both = sum(work.both for work in towers) * seen.passed // seen.rows
    return forward + seen.heads.forward + product, both + seen.heads.both + 4 * product


def bandwidth(cluster: ClusterConfig, gpus: int) -> float:
    """What a ring over so many GPUs moves, 10^9 bytes a second.

    Source: NVIDIA, nccl-tests, doc/PERFORMANCE.md ("bus bandwidth").
    """
    if gpus <= cluster.gpus_per_node:
        return cluster.within_node_gb_per_s
    return min(cluster.within_node_gb_per_s, cluster.between_nodes_gb_per_s)


def _seconds(sends: list[Transfer], world: int, link: float) -> float:
    return sum(transfer.sent(world) for transfer in sends) / link
