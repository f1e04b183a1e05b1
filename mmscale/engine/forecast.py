"""What a run would need, before a node is paid for: memory, traffic, steps, efficiency."""

from dataclasses import dataclass, replace

import torch

from mmscale.config.cluster import ClusterConfig
from mmscale.config.model import ModelConfig
from mmscale.config.rules import trained_terms
from mmscale.config.schema import Config
from mmscale.config.taught import TeacherTerm
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.engine.footprint import Footprint, footprint
from mmscale.engine.memory import TOWER_ACTIVATIONS, UNZEROED, Holding, Sharding, Workload, holdings
from mmscale.engine.optimizer import optimizer_kind
from mmscale.engine.plan import BatchPlan, plan_batch
from mmscale.engine.wire import GPUS, StepTime, Transfer, predict, transfers
from mmscale.engine.zero_settings import deepspeed_settings, ds_file
from mmscale.errors import ConfigError
from mmscale.model.outline import outline
from mmscale.model.presets import HF, OPENCLIP

FILES = {
    "ZeRO-1": "ds_configs/zero1.json",
    "ZeRO-2": "ds_configs/zero2.json",
    "ZeRO-3": "ds_configs/zero3.json",
    "ZeRO-3 + offload": "ds_configs/zero3_offload.json",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Data:
    """The training set.

    Attributes:
        images: In an epoch.
        shards: Files; None where the set is known by its number of images alone.
        steps_per_epoch: Full batches.
        steps: Of the run.
    """

    images: int
    shards: int | None
    steps_per_epoch: int
    steps: int


@dataclass(frozen=True)
class Forecast:
    """The prediction for one configuration.

    Attributes:
        batch: The global batch.
        data: The training set.
        seen: The model.
        precision: Of matrix products.
        chosen: Name of the sharding that the configuration asks for.
        memory: By sharding.
        wire: By sharding.
        steps: Updates at each of `GPUS`, by sharding; each GPU keeps its rows.
        here: An update on the ranks that were asked for, by sharding.
        cluster: The GPUs and links.
    """

    batch: BatchPlan
    data: Data
    seen: Footprint
    precision: str
    chosen: str
    memory: dict[str, list[Holding]]
    wire: dict[str, list[Transfer]]
    steps: dict[str, list[StepTime]]
    here: dict[str, StepTime]
    cluster: ClusterConfig

    @property
    def room(self) -> dict[str, int]:
        """Bytes on a device, of the ways to shard that fit into one."""
        return _that_fit(self.memory, self.cluster)

    @property
    def fastest(self) -> str:
        """Of the ways to shard that fit, that with the shortest update, if possible the chosen."""
        timed = [name for name in (self.chosen, *self.room) if name in self.here]
        return min(timed, key=lambda name: self.here[name].seconds, default=self.chosen)

    @property
    def chunks_wanted(self) -> int:
        """The fewest chunks with which activations leave a tenth of a device's memory free."""
        held = self.memory[self.chosen]
        fitting = fewest_chunks(held, self.seen, self.batch, self.cluster)
        return min(fitting or self.batch.chunks, self.batch.chunks)


def fewest_chunks(
    held: list[Holding], seen: Footprint, batch: BatchPlan, cluster: ClusterConfig
) -> int | None:
    """In how many chunks a rank's rows leave a tenth of a GPU's memory free; None: in none."""
    kept = sum(holding.bytes for holding in held if holding.name == TOWER_ACTIVATIONS)
    free = 0.9e9 * cluster.memory_gb - (device_bytes(held) - kept)
    chunks = (n for n in range(1, batch.rank_rows + 1) if batch.rank_rows % n == 0)
    at_once = {n: batch.rank_rows // n if n > 1 else seen.passed for n in chunks}
    return next((n for n, rows in at_once.items() if kept * rows / seen.rows <= free), None)


def forecast(
    config: Config, world: int, cluster: ClusterConfig, samples: int | None, tokens: int | None
) -> Forecast:
    """Plan a run without training, data or GPUs.

    Args:
        config: The run.
        world: Ranks.
        cluster: Where it would run.
        samples: Images of an epoch; None reads the manifest of `data.train`.
        tokens: Tokens of a batch's longest caption; None: as many as the tower takes.

    Raises:
        ConfigError: It could not run as it is configured.
        DataError: The data is not there.
    """
    batch = plan_batch(config, world)
    precision = "bf16" if config.engine.precision == "auto" else config.engine.precision
    dtype = DTYPES.get(precision, torch.float32)
    shardings, chosen = _shardings(config, batch, dtype)
    data = _data(config, batch, samples)
    model, spec = outline(config.model, config.data.image_size)
    if tokens is not None and tokens > spec.context_length:
        raise ConfigError(
            f"--tokens {tokens} is more than the {spec.context_length} that the text tower takes; "
            "lower it"
        )
    seen = footprint(model, spec, config, batch, tokens or spec.context_length, dtype)
    queue, _ = config.negatives.queue.slots(data.images)
    work = Workload(seen, config, batch, queue, dtype, _teacher_sizes(config))
    memory = {sharding.name: holdings(work, sharding) for sharding in shardings}
    _require_room(memory, chosen, work, cluster)
    on_gpus = [replace(work, plan=replace(batch, world=gpus)) for gpus in GPUS]
    # What the host computes and copies has no figure in a cluster's description.
    timed = [sharding for sharding in shardings if not sharding.offloads]
    steps = {
        sharding.name: [predict(each, sharding, precision, cluster) for each in on_gpus]
        for sharding in timed
    }
    here = {sharding.name: predict(work, sharding, precision, cluster) for sharding in timed}
    wire = {sharding.name: transfers(work, sharding) for sharding in shardings}
    return Forecast(batch, data, seen, precision, chosen, memory, wire, steps, here, cluster)


def _shardings(config: Config, batch: BatchPlan, dtype: torch.dtype) -> tuple[list[Sharding], str]:
    """The shipped ways, and the configured one if it is none of them; its name."""
    found = [UNZEROED]
    for name, file in FILES.items():
        zero = ds_file(file, batch.chunks)["zero_optimization"]
        found.append(Sharding(name, zero["stage"], zero))
    own = config.engine.deepspeed
    sharded = own is not None or config.engine.kind == "deepspeed"
    cut = sharded or batch.world > 1
    if optimizer_kind(config.optim, fused=False, sharded=cut, flat=sharded).kept.unsharded:
        return [UNZEROED], UNZEROED.name
    if own is None:
        return found, found[1 if sharded else 0].name
    zero = deepspeed_settings(config, batch, dtype)["zero_optimization"]
    same = [sharding.name for sharding in found if sharding.zero == zero]
    if same:
        return found, same[0]
    return [*found, Sharding(own, zero["stage"], zero)], own


def _data(config: Config, batch: BatchPlan, samples: int | None) -> Data:
    if samples is None:
        shards = open_train(config.data)
        schedule = plan_schedule(config, shards, batch.lanes)
        images, count, steps = schedule.items, len(shards.paths), schedule.steps
    else:
        if config.data.captions == "flat":
            raise ConfigError(
                "--samples counts images, but data.captions=flat makes every caption a row; pack "
                "the data, or set data.captions"
            )
        images, count = samples, None
        steps = samples // (batch.global_rows // config.data.rows_per_item)
    if not steps:
        raise ConfigError(
            f"{images:,} images do not fill one batch of train.global_batch_size="
            f"{batch.global_rows}; lower it"
        )
    return Data(images, count, steps, config.train.duration.steps(steps, batch.global_rows))


def _teacher_sizes(config: Config) -> dict[str, int | None]:
    """Bytes of every teacher of the run; None for one that is a run, which is not opened here."""
    sizes: dict[str, int | None] = {}
    for term in trained_terms(config):
        if not isinstance(term, TeacherTerm) or term.model in sizes:
            continue
        preset = term.model
        if preset.startswith(OPENCLIP) and "@" in preset:
            preset = preset.rpartition("@")[0]
        sizes[term.model] = None
        if preset.startswith((HF, OPENCLIP)):
            model, _ = outline(ModelConfig(preset=preset), None)
            sizes[term.model] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return sizes


def _require_room(
    memory: dict[str, list[Holding]], chosen: str, work: Workload, cluster: ClusterConfig
) -> None:
    batch = work.plan
    needed = device_bytes(memory[chosen])
    if needed <= 1e9 * cluster.memory_gb:
        return
    repairs = [f"take {name}" for name in _that_fit(memory, cluster)][:1]
    chunks = fewest_chunks(memory[chosen], work.seen, batch, cluster)
    if chunks is not None:
        repairs.append(f"set train.micro_batch_size={batch.rank_rows // chunks}")
    repairs.append("switch model.vision.checkpointing on")
    raise ConfigError(
        f"{chosen} on {batch.world} ranks needs {needed / 1e9:.1f} GB a GPU with "
        f"train.micro_batch_size={batch.micro_rows}, a GPU of {cluster.name} has "
        f"{cluster.memory_gb:g}; {', or '.join(repairs)}"
    )


def _that_fit(memory: dict[str, list[Holding]], cluster: ClusterConfig) -> dict[str, int]:
    sizes = {name: device_bytes(held) for name, held in memory.items()}
    return {name: size for name, size in sizes.items() if size <= 1e9 * cluster.memory_gb}


def device_bytes(held: list[Holding]) -> int:
    """All that does not lie in the host's memory."""
    return sum(holding.bytes for holding in held if not holding.host)
