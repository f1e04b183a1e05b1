"""From a configuration to the parts of a run: what training and the verbs share."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmscale.checkpoint.files import Checkpoint, Progress, save
from mmscale.checkpoint.resume import open_checkpoint, require_same_run, starting_point
from mmscale.config.load import validate
from mmscale.config.schema import Config, ModelConfig
from mmscale.contracts import Engine, InputSpec, Peers, World
from mmscale.data.features import CachedStream, FeatureTable
from mmscale.data.shards import ShardSet, open_shards
from mmscale.data.stream import Schedule, TrainStream, plan_schedule
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import recalls
from mmscale.dist.device import DevicePolicy, choose, rng_state, set_rng_state
from mmscale.dist.peers import connect
from mmscale.dist.world import join
from mmscale.engine.encode import Call, encode
from mmscale.engine.feature_cache import FeatureCache
from mmscale.engine.inference import Inference
from mmscale.engine.plan import BatchPlan, plan_batch
from mmscale.engine.standardize import fit_heads
from mmscale.loss.objective import Objective
from mmscale.model.build import build_model
from mmscale.model.presets import fill_preset

Tell = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """The pairs that a run is evaluated on; `table`: their features, where towers are frozen."""

    shards: ShardSet
    spec: InputSpec
    table: FeatureTable | None


@dataclass(frozen=True)
class Training:
    """Everything that the loop needs."""

    config: Config
    world: World
    peers: Peers
    plan: BatchPlan
    policy: DevicePolicy
    engine: Engine
    objective: Objective
    stream: TrainStream | CachedStream
    held_out: HeldOut | None
    start: Progress
    total_steps: int

    @property
    def schedule(self) -> Schedule:
        """The order of the data."""
        return self.stream.schedule


def assemble(config: Config, world: World, tell: Tell) -> Training:
    """Build a run: joined ranks, data, model, engine, restored state. Collective.

    Args:
        config: The run.
        world: The launcher's promise.
        tell: Takes a line about what is built, as it is built.
    """
    config = config.model_copy(update={"model": fill_preset(config.model)})
    plan = plan_batch(config, world.size)
    policy = choose(config.engine, world.local_rank)
    kind = engine_kind(config, world)
    _share_cores(policy, world)
    join(world, policy.backend, config.engine.timeout, alone_too=kind == "deepspeed")
    peers = connect(world)
    shards = open_shards("data.train", config.data.train)
    schedule = plan_schedule(config, [shard.captions for shard in shards.shards], plan.lanes)
    checkpoint = starting_point(config, world, tell)
    # A checkpoint holds every weight: none is fetched for a model that it fills.
    wanted = config.model if checkpoint is None else _bare(config.model)
    model, spec = build_model(wanted, config.data.image_size, config.run.seed)
    if checkpoint is not None:
        checkpoint.load_weights(model)
        require_same_run(checkpoint, config, plan.lanes)
    tell(f"batch: {plan}")
    tell(f"device: {policy.device}, {str(policy.dtype).removeprefix('torch.')} ({policy.reason})")
    inference = Inference(model, policy)
    table, held_out = _features(config, model, spec, inference, peers, shards, tell)
    stream = (
        TrainStream(config, shards, schedule, spec, world)
        if table is None
        else CachedStream(schedule, shards, table, world)
    )
    if checkpoint is None and config.model.head.standardize:
        fit_heads(model, inference, stream, peers, config.model.head.standardize)
    engine = _engine(kind, model.train(), config, plan, policy, world)
    # Ranks draw different dropout masks; a resumed run gets each rank's own state back.
    torch.manual_seed(config.run.seed * 1_000_003 + world.rank)
    if checkpoint is not None:
        engine.restore(checkpoint.moments, checkpoint.progress.updates)
        if random := checkpoint.random(world.rank):
            set_rng_state(policy.device, random)
    return Training(
        config=config,
        world=world,
        peers=peers,
        plan=plan,
        policy=policy,
        engine=engine,
        objective=Objective(config, peers),
        stream=stream,
        held_out=held_out,
        start=checkpoint.progress if checkpoint else Progress(lanes=plan.lanes),
        total_steps=config.train.duration.steps(schedule.steps, plan.global_rows),
    )


def _bare(model: ModelConfig) -> ModelConfig:
    """The same architecture without pretrained weights."""
    towers = {
        "vision": model.vision.model_copy(update={"weights": "random"}),
        "text": model.text.model_copy(update={"weights": "random"}),
    }
    return model.model_copy(update={"weights": "random", **towers})


def engine_kind(config: Config, world: World) -> str:
    """`deepspeed` or `accelerate`."""
    if config.engine.kind != "auto":
        return config.engine.kind
    sharded = config.engine.deepspeed is not None or world.launcher == "deepspeed"
    return "deepspeed" if sharded else "accelerate"


def _engine(
    kind: str, model: nn.Module, config: Config, plan: BatchPlan, policy: DevicePolicy, world: World
) -> Engine:
    # Imported here: each engine's library is needed by its own runs only.
    if kind == "deepspeed":
        from mmscale.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, plan, policy, world)
    from mmscale.engine.accelerate import AccelerateEngine

    return AccelerateEngine(model, config, policy, world)


def _share_cores(policy: DevicePolicy, world: World) -> None:
    """Ranks on one machine's CPU share its cores, unless the user said how."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world.size)))
    if policy.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and local > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def _features(
    config: Config,
    model: nn.Module,
    spec: InputSpec,
    inference: Inference,
    peers: Peers,
    shards: ShardSet,
    tell: Tell,
) -> tuple[FeatureTable | None, HeldOut | None]:
    """Cached features of the training set, and the held-out pairs."""
    held_out = open_shards("data.eval", config.data.eval) if config.data.eval else None
    if config.data.feature_cache is None:
        return None, HeldOut(held_out, spec, None) if held_out else None
    cache = FeatureCache(Path(config.data.feature_cache), model, spec)

    def table(which: ShardSet) -> FeatureTable:
        def make() -> FeatureTable:
            tell(f"features: {which.samples:,} images through the frozen towers, once")
            return encode_set(
                config, inference.call, inference.device, which, spec, peers, _tenths(tell)
            )

        return cache.table(which, peers, make)

    return table(shards), HeldOut(held_out, spec, table(held_out)) if held_out else None


def encode_set(
    config: Config,
    call: Call,
    device: torch.device,
    shards: ShardSet,
    spec: InputSpec,
    peers: Peers,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureTable:
    """A set through the towers with the run's settings. Collective."""
    return encode(
        call,
        device,
        shards,
        spec,
        peers,
        config.eval.batch_size,
        config.data.workers,
        config.data.max_damaged,
        progress,
    )


def _tenths(tell: Tell) -> Callable[[int, int], None]:
    """Progress that speaks at each tenth."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            tell(f"features: {done:,} of this rank's {total:,} images done")

    return progress


def embed(call: Call, device: torch.device, table: FeatureTable) -> Pairs:
    """Tower outputs through the heads: the pairs that are evaluated. Collective under ZeRO-3."""
    good, captions = table.good, table.good.repeat_interleave(table.first.diff())
    with torch.no_grad():
        image, text, scale = call(
            "heads", table.image[good].to(device), table.text[captions].to(device)
        )
    return Pairs(
        image=image.unit.float().cpu(),
        text=text.unit.float().cpu(),
        image_ids=table.image_ids[good],
        text_ids=table.text_ids()[captions],
        backbone_image=table.image[good],
        backbone_text=table.text[captions],
        logit_scale=float(scale),
    )


def evaluate(training: Training) -> tuple[dict[str, float], Pairs] | None:
    """Recall on the held-out pairs, and their embeddings; None without any. Collective."""
    held_out, engine = training.held_out, training.engine
    if held_out is None:
        return None
    engine.module.eval()
    table = held_out.table or encode_set(
        training.config, engine.call, engine.device, held_out.shards, held_out.spec, training.peers
    )
    pairs = embed(engine.call, engine.device, table)
    engine.module.train()
    return {f"eval/{k}": v for k, v in recalls(pairs, training.peers).items()}, pairs


def save_checkpoint(training: Training, progress: Progress) -> Path:
    """Write a checkpoint of a run in training. Collective."""
    return save(
        Path(training.config.run.dir),
        progress,
        training.config.model_dump(mode="json"),
        training.engine.tensors(),
        rng_state(training.policy.device),
        training.world,
        training.config.checkpoint.keep,
    )


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be called by one process."""

    config: Config
    model: nn.Module
    spec: InputSpec
    inference: Inference
    checkpoint: Checkpoint


def load_trained(path: Path) -> Trained:
    """The model of a run or checkpoint.

    Raises:
        CheckpointError: Neither, or damaged.
    """
    checkpoint = open_checkpoint(path, World())
    config = validate(checkpoint.config)
    model, spec = build_model(_bare(config.model), config.data.image_size, config.run.seed)
    checkpoint.load_weights(model)
    return Trained(config, model, spec, Inference(model, choose(config.engine)), checkpoint)


def embed_set(trained: Trained, shards: ShardSet, peers: Peers) -> Pairs:
    """A set through a trained model."""
    call, device = trained.inference.call, trained.inference.device
    table = encode_set(trained.config, call, device, shards, trained.spec, peers)
    return embed(call, device, table)
