"""From a configuration to the parts of a run: what training and the verbs share."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from mmscale.checkpoint.files import Checkpoint, Origin, Progress
from mmscale.checkpoint.resume import require_same_run, starting_point
from mmscale.checkpoint.write import Snapshot, take_snapshot
from mmscale.config.batches import OWN_MODEL, HardBatchesConfig
from mmscale.config.deepspeed import zero_stage
from mmscale.config.duration import Duration
from mmscale.config.load import stage_config, with_words
from mmscale.config.needs import (
    needs_momentum,
    with_fusion_decided,
)
from mmscale.config.schema import Config, ModelConfig
from mmscale.config.staging import expanded
from mmscale.contracts import Engine, InputSpec, Peers, World
from mmscale.data.caption_text import with_cleaning
from mmscale.data.features import CachedStream, FeatureTable
from mmscale.data.neighbours import Neighbours, read_neighbours
from mmscale.data.schedule import Schedule, plan_schedule
from mmscale.data.shards import ShardSet, open_shards, open_train
from mmscale.data.stream import TrainStream
from mmscale.dist.device import DevicePolicy, choose, rng_state, set_rng_state
from mmscale.dist.peers import connect, from_main
from mmscale.dist.world import join
from mmscale.engine.build_companions import build_companions
from mmscale.engine.companions import Companions
from mmscale.engine.encode import Call, encode
from mmscale.engine.feature_cache import FeatureCache
from mmscale.engine.fit_heads import fit_heads
from mmscale.engine.flops import Flops, count_flops
from mmscale.engine.inference import Inference
from mmscale.engine.momentum import averaged, copy_of
from mmscale.engine.optimizer_kind import optimizer_kind
from mmscale.engine.own_neighbours import own_neighbours
from mmscale.engine.plan import BatchPlan, plan_batch
from mmscale.engine.rehearsal import gaps_line
from mmscale.engine.stages import stage_lengths
from mmscale.loss.objective import Objective
from mmscale.model.batch_norm import connect_batch_norms
from mmscale.model.build import build_model
from mmscale.model.presets import fill_preset, stand_in_line
from mmscale.model.scale import with_scale_fitted
from mmscale.model.selection import check_patterns, select
from mmscale.model.two_tower import TwoTower
from mmscale.preflight import require_room, require_same_everywhere

Tell = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """The pairs that a run is evaluated on; `table`: their features, where towers are frozen."""

    shards: ShardSet
    spec: InputSpec
    table: FeatureTable | None


@dataclass(frozen=True)
class Segment:
    """A stretch of a run with one configuration and one engine.

    Attributes:
        config: The run's.
        origin: What it goes on from; None: as `run.resume` says.
        start: Where it goes on, if not where the origin stands.
    """

    config: Config
    origin: Origin | None = None
    start: Progress | None = None


@dataclass(frozen=True)
class Training:
    """Everything that the loop needs for one segment of a run.

    Attributes:
        run: The whole run's configuration.
        config: That of the stage which trains now.
        end: `Progress.step` at which the stage ends.
        total_steps: The same of the run.
    """

    run: Config
    config: Config
    world: World
    peers: Peers
    plan: BatchPlan
    policy: DevicePolicy
    engine: Engine
    companions: Companions
    objective: Objective
    stream: TrainStream | CachedStream
    spec: InputSpec
    held_out: HeldOut | None
    flops: Flops | None
    start: Progress
    end: int
    total_steps: int

    @property
    def schedule(self) -> Schedule:
        """The order of the data."""
        return self.stream.schedule

    def steps(self, duration: Duration) -> int:
        """A duration in updates, at least one, cut to the run's length."""
        steps = duration.steps(self.schedule.steps, self.plan.global_rows)
        return max(1, min(steps, self.total_steps))

    def due(self, every: Duration | None, step: int) -> bool:
        """Whether something that happens every so often happens after `step`."""
        return every is not None and step % self.steps(every) == 0

    def close(self) -> None:
        """Free the engine and what follows it."""
        self.companions.close()
        self.engine.close()


def assemble(segment: Segment, world: World, tell: Tell) -> Training:
    """Build a segment: joined ranks, data, model, engine, restored state. Collective.

    Args:
        segment: What to build, and from what.
        world: The launcher's promise.
        tell: Takes a line about what is built, as it is built.
    """
    run = segment.config
    policy = choose(run.engine, world.local_rank)
    filled = fill_preset(run.model, policy.failing_towers)
    if stand_in := stand_in_line(run.model, filled):
        tell(f"{policy.device}: {stand_in}")
    run = with_fusion_decided(run.model_copy(update={"model": filled}))
    stages = [stage_config(run, number) for number in range(max(1, len(expanded(run))))]
    plans = [plan_batch(stage, world.size) for stage in stages]
    kind = engine_kind(run, world)
    for stage in stages:
        optimizer_kind(stage.optim, policy.fused_optimizer, sharded=kind == "deepspeed")
    _share_cores(policy, world)
    join(world, policy.backend, run.engine.timeout, alone_too=kind == "deepspeed")
    peers = connect(world)
    shards = open_train(run.data)
    if segment.origin is None:
        require_same_everywhere(run, shards.digest, world)
    schedule = plan_schedule(stages[0], shards, plans[0].lanes)
    lengths = stage_lengths(run, stages, schedule.items)
    origin = segment.origin or starting_point(run, world, tell)
    if origin is not None and (words := origin.progress.remedies):
        mended = with_words(run, words)
        if mended != with_words(run, ()):
            tell(f"guard: this run goes on with {' '.join(words)}")
            return assemble(replace(segment, config=mended), world, tell)
    start = segment.start or (origin.progress if origin else Progress())
    config, plan = stages[start.stage], plans[start.stage]
    if start.stage:
        schedule = plan_schedule(config, shards, plan.lanes)
    hard = config.data.hard_batches
    if (table := _neighbours(hard, world, origin)) is not None:
        tell(f"hard batches: neighbours from {hard.table}")
        schedule = plan_schedule(config, shards, plan.lanes, table)
        tell(f"hard batches: {schedule.with_neighbours:.0%} of the images have neighbours")
    # An origin holds every weight: none is fetched for a model that it fills.
    wanted = config.model if origin is None else without_weights(config.model)
    wanted = with_scale_fitted(wanted, shards.samples)
    model, spec = build_model(wanted, config.data.image_size, config.run.seed)
    spec = with_cleaning(spec, config.data.caption_cleaning)
    if origin is not None:
        origin.load_weights(model)
    if isinstance(origin, Checkpoint) and segment.origin is None:
        require_same_run(origin, run, plan.lanes)
    check_patterns(model, run)
    for line in select(model, run, start.stage):
        tell(line)
    require_room(config, model, needs_momentum(config), world)
    tell(f"batch: {plan}")
    tell(f"device: {policy}")
    if gaps := gaps_line(model, spec, policy):
        tell(gaps)
    inference = Inference(model, policy)
    features, held_out = _features(config, model, spec, inference, peers, shards, tell)
    stream = (
        TrainStream(config, shards, schedule, spec, world)
        if features is None
        else CachedStream(schedule, shards, features, world)
    )
    if origin is None:
        fit_heads(model, inference, stream, peers, plan.micro_rows, spec)
    if hard.table == OWN_MODEL and table is None:
        tell("hard batches: neighbours by the model as it is now")
        known = features or encode_set(
            config, inference.call, inference.device, shards, spec, peers, _tenths(tell)
        )
        table = own_neighbours(inference, known, hard.by, world)
        stream.schedule = plan_schedule(config, shards, plan.lanes, table)
    connect_batch_norms(model, peers)
    steps_of = partial(
        Duration.steps, steps_per_epoch=schedule.steps, global_batch_size=plan.global_rows
    )
    model.scale.follow(steps_of)
    follower = _follower(config, kind, model, origin)
    # Cached features do not pass the towers.
    flops = count_flops(model.train(), spec) if features is None and world.is_main else None
    engine = _engine(kind, model.train(), config, plan, policy, world)
    companions = build_companions(
        config,
        engine,
        follower,
        policy,
        plan,
        world,
        shards.samples,
        schedule.steps,
        steps_of,
        None if origin is None else origin.companions,
    )
    # Ranks draw different dropout masks; a resumed run gets each rank's own state back.
    torch.manual_seed(config.run.seed * 1_000_003 + start.stage * 500_009 + world.rank)
    if origin is not None:
        trained = origin.progress.updates - origin.progress.stage_updates
        engine.restore(origin.moments, trained, origin.progress.scaler)
        if random := origin.random(world.rank):
            set_rng_state(policy.device, random)
    end = start.step if start.over else start.stage_start + lengths[start.stage]
    return Training(
        run=run,
        config=config,
        world=world,
        peers=peers,
        plan=plan,
        policy=policy,
        engine=engine,
        companions=companions,
        objective=Objective(config, peers, steps_of),
        stream=stream,
        spec=spec,
        held_out=held_out,
        flops=flops,
        start=replace(start, lanes=plan.lanes),
        end=end,
        total_steps=end + (0 if start.over == "run" else sum(lengths[start.stage + 1 :])),
    )


def without_weights(model: ModelConfig) -> ModelConfig:
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


def _neighbours(hard: HardBatchesConfig, world: World, origin: Origin | None) -> Neighbours | None:
    """The table that the stage began with, else the one that it is given; equal on every rank.

    None without any yet.
    """
    if hard.table is None:
        return None
    if origin is not None and (kept := origin.companions("hard_batches.")):
        return Neighbours.of(kept)
    if hard.table == OWN_MODEL:
        return None
    read = read_neighbours(Path(hard.table), hard.by).tensors() if world.is_main else None
    return Neighbours.of(from_main(world, read))


def _follower(
    config: Config, kind: str, model: nn.Module, origin: Origin | None
) -> nn.Module | None:
    """What becomes the momentum encoder; taken before an engine shards the model."""
    if not needs_momentum(config):
        return None
    sharded = kind == "deepspeed" and zero_stage(config.engine.deepspeed) == 3
    follower = copy_of(model, share_frozen=not sharded)
    if origin is not None:
        origin.load_momentum(averaged(follower, model))
    return follower


def _share_cores(policy: DevicePolicy, world: World) -> None:
    """Ranks on one machine's CPU share its cores, unless the user said how."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world.size)))
    if policy.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and local > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def _features(
    config: Config,
    model: TwoTower,
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
    limit = config.data.cache_gb * 1e9
    cache = FeatureCache(Path(config.data.feature_cache), model, spec, limit)

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


def snapshot(training: Training, progress: Progress) -> Snapshot:
    """What a checkpoint of a run in training holds. Collective."""
    return take_snapshot(
        replace(progress, scaler=training.engine.scaler()),
        training.run.model_dump(mode="json"),
        chain(
            training.engine.tensors(),
            training.companions.tensors(),
            training.schedule.tensors(),
        ),
        rng_state(training.policy.device),
        training.world,
    )
