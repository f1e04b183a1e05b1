"""How much of many GPUs' speed is left beside what they send one another: a prediction.

A step takes the time of its products at the cluster's utilisation of the peak, plus that of every
exchange which the backward does not hide. Latencies, stragglers and the reading of data are left
out: real efficiency lies below.
"""

from dataclasses import dataclass

import torch

from mmscale.config.cluster import ClusterConfig
from mmscale.config.schema import Config
from mmscale.engine.footprint import Footprint
from mmscale.engine.memory import Sharding
from mmscale.engine.plan import BatchPlan
from mmscale.engine.wire import Transfer, transfers

GPUS = (8, 16, 32, 64, 128, 256, 512)
FORMULA = (
    "compute / (compute + exposed); compute = FLOPs a rank / (peak x utilisation); exposed = bytes "
    "sent that the backward does not hide / (bandwidth x link share); bandwidth of a ring: a GPU's "
    "link in one node, else the smaller of that and a node's"
)


@dataclass(frozen=True)
class Step:
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
    def efficiency(self) -> float:
        """Share of the speed that as many lone GPUs would have together."""
        return self.compute / (self.compute + self.exposed)

    @property
    def samples_per_second(self) -> float:
        """Pairs a second over all GPUs."""
        return self.global_rows / (self.compute + self.exposed)


def predict(
    seen: Footprint,
    sharding: Sharding,
    config: Config,
    plan: BatchPlan,
    queue: int,
    dtype: torch.dtype,
    precision: str,
    cluster: ClusterConfig,
) -> Step:
    """One update on `plan.world` GPUs of the cluster."""
    speed = 1e12 * getattr(cluster.peak_tflops, precision) * cluster.utilisation
    forward, both = rank_flops(seen, config, plan)
    sends = transfers(seen, sharding, config, plan, queue, dtype)
    link = 1e9 * bandwidth(cluster, plan.world) * cluster.link_share
    hidden = _seconds([t for t in sends if t.overlaps], plan.world, link)
    open_ = _seconds([t for t in sends if not t.overlaps], plan.world, link)
    backward = (both - forward) / speed
    exposed = open_ + max(0.0, hidden - backward)
    again = forward if plan.chunks > 1 else 0
    return Step(plan.world, plan.global_rows, (both + again) / speed, exposed)


def rank_flops(seen: Footprint, config: Config, plan: BatchPlan) -> tuple[int, int]:
    """FLOPs of a rank's update: of its forward, and with the backward; recomputation not counted.

    The logits count as four products of b x n x d: forward, and a gradient to either side, of
    which the tiled loss computes the first twice.
    """
    towers = seen.towers.values()
    rows, columns = plan.rank_rows, plan.global_rows
    product = 2 * rows * columns * config.model.embed_dim
    forward = plan.chunks * sum(work.forward for work in towers) + seen.heads.forward + product
    both = plan.chunks * sum(work.both for work in towers) + seen.heads.both + 4 * product
    return forward, both


def bandwidth(cluster: ClusterConfig, gpus: int) -> float:
    """What a ring over so many GPUs moves, 10^9 bytes a second.

    Source: NVIDIA, nccl-tests, doc/PERFORMANCE.md ("bus bandwidth").
    """
    if gpus <= cluster.gpus_per_node:
        return cluster.within_node_gb_per_s
    return min(cluster.within_node_gb_per_s, cluster.between_nodes_gb_per_s)


def _seconds(sends: list[Transfer], world: int, link: float) -> float:
    return sum(transfer.sent(world) for transfer in sends) / link
