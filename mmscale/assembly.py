"""From a configuration to the parts of a run: what training and the verbs share."""

import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from mmscale.checkpoint.files import Checkpoint, Origin
from mmscale.checkpoint.lock import RunLock
from mmscale.checkpoint.resume import first_weights, require_same_run
from mmscale.checkpoint.state import Progress
from mmscale.checkpoint.write import Kept, Snapshot, take_snapshot
from mmscale.config.batches import OWN_MODEL, HardBatchesConfig
from mmscale.config.deepspeed import zero_stage
from mmscale.config.duration import Duration
from mmscale.config.load import stage_config
from mmscale.config.needs import needs_momentum, with_fusion_decided
from mmscale.config.schema import Config, ModelConfig
from mmscale.config.staging import expanded
from mmscale.contracts import Engine, InputSpec, Peers, World
from mmscale.data.caption_text import with_cleaning
from mmscale.data.features import CachedStream
from mmscale.data.neighbours import Neighbours, read_neighbours
from mmscale.data.schedule import Schedule, plan_schedule
from mmscale.data.shards import ShardSet, open_train
from mmscale.data.stream import TrainStream
from mmscale.dist.device import DevicePolicy, choose, rng_state, set_rng_state
from mmscale.dist.peers import connect, from_main
from mmscale.dist.world import join
from mmscale.encoding import HeldOut, Tell, encoded_sets, found_alike
from mmscale.engine.build_companions import build_companions
from mmscale.engine.companions import Companions
from mmscale.engine.fit_heads import fit_heads
from mmscale.engine.flops import Flops, count_flops
from mmscale.engine.inference import Inference
from mmscale.engine.momentum import averaged, copy_of
from mmscale.engine.optimizer_kind import optimizer_kind
from mmscale.engine.plan import BatchPlan, plan_batch
from mmscale.engine.rehearsal import gaps_line
from mmscale.engine.stages import stage_lengths
from mmscale.loss.objective import Objective
from mmscale.model.batch_norm import connect_batch_norms
from mmscale.model.build import build_model
from mmscale.model.kept import kept_towers, tower_files
from mmscale.model.presets import fill_preset, stand_in_line
from mmscale.model.scale import with_scale_fitted
from mmscale.model.selection import check_patterns, select
from mmscale.model.two_tower import TwoTower
from mmscale.model.unseen import unseen_line
from mmscale.preflight import (
    begin,
    checkpoints_ahead,
    require_outputs,
    require_room,
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a run with one configuration and one engine.

    Attributes:
        config: The run's.
        origin: What it goes on from; None: as `run.resume` says.
        start: Where it goes on, if not where the origin stands.
        kept: What the run's checkpoints hold alike; None where that is to be found out.
        lock: Taken before a run that starts looks into its folder.
    """

    config: Config
    origin: Origin | None = None
    start: Progress | None = None
    kept: Kept | None = None
    lock: RunLock | None = None


@dataclass(frozen=True)
class Training:
    """Everything that the loop needs for one segment of a run.

    Attributes:
        run: The whole run's configuration.
        kept: What all of its checkpoints hold.
        config: That of the stage which trains now.
        end: `Progress.step` at which the stage ends.
        total_steps: The same of the run.
    """

    run: Config
    kept: Kept
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

    def is_kept(self, step: int) -> bool:
        """Whether `checkpoint.keep` counts the checkpoint of `step`: not one that a stop left.

        Where none is ever due, all of them count.
        """
        every = self.config.checkpoint.every
        return every is None or self.due(every, step)

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
    outline = _outline(segment.config, world, tell)
    run, policy, kind = outline.run, outline.policy, outline.kind
    _share_cores(policy, world)
    join(world, policy.backend, run.engine.timeout, alone_too=kind == "deepspeed")
    peers = connect(world)
    if segment.origin is None:
        require_outputs(run, world)
    shards = open_train(run.data)
    origin, kept = segment.origin, segment.kept
    if origin is None:
        origin, kept = begin(run, outline.lanes, shards, segment.lock, world, tell)
    assert kept is not None, "a segment that goes on from another holds what its checkpoints keep"
    first = plan_schedule(outline.stages[0], shards, outline.plans[0].lanes)
    lengths = stage_lengths(run, outline.stages, first.items)
    start = segment.start or (origin.progress if origin else Progress())
    config, plan = outline.stages[start.stage], outline.plans[start.stage]
    table = _neighbours(config.data.hard_batches, world, origin)
    is_first = start.stage == 0 and table is None
    schedule = first if is_first else _schedule(config, plan, shards, table, tell)
    begun = origin or first_weights(config.model)
    towers = _towers(config, begun)
    if segment.kept is None and world.is_main:
        kept = replace(kept, attached=tower_files(towers))
    model, spec = _model(config, towers, shards, begun)
    if isinstance(origin, Checkpoint) and segment.origin is None:
        require_same_run(origin, run, kept.contents, outline.lanes)
    _settle_what_trains(model, spec, outline, start.stage, tell)
    steps_of = partial(
        Duration.steps, steps_per_epoch=schedule.steps, global_batch_size=plan.global_rows
    )
    end = start.step if start.over else start.stage_start + lengths[start.stage]
    total_steps = end + (0 if start.over == "run" else sum(lengths[start.stage + 1 :]))
    ahead = checkpoints_ahead(config, total_steps - start.step, steps_of)
    require_room(config, model, ahead, needs_momentum(config), world)
    inference = Inference(model, policy)
    features, held_out = encoded_sets(config, model, spec, inference, peers, shards, tell)
    stream: TrainStream | CachedStream = (
        TrainStream(config, shards, schedule, spec, world)
        if features is None
        else CachedStream(schedule, shards, features, world)
    )
    if begun is None:
        fit_heads(model, inference, stream, peers, plan.micro_rows, spec)
    if config.data.hard_batches.table == OWN_MODEL and table is None:
        tell("hard batches: neighbours by the model as it is now")
        table = found_alike(config, inference, features, shards, spec, world, peers, tell)
        stream.schedule = plan_schedule(config, shards, plan.lanes, table)
    connect_batch_norms(model, peers)
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
    _restore(engine, origin, config.run.seed, start.stage, world, policy)
    return Training(
        run=run,
        kept=kept,
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
        total_steps=total_steps,
    )


@dataclass(frozen=True)
class _Outline:
    """A run before anything is built.

    Attributes:
        run: Its configuration with all that is left to presets and to what is there.
        stages: The configuration of each stage; at least one.
        plans: How each stage's batch is cut.
        kind: Of engine: `deepspeed` or `accelerate`.
    """

    run: Config
    policy: DevicePolicy
    stages: list[Config]
    plans: list[BatchPlan]
    kind: str

    @property
    def lanes(self) -> list[int]:
        """Lanes of the data in each stage."""
        return [plan.lanes for plan in self.plans]


def _outline(config: Config, world: World, tell: Tell) -> _Outline:
    """Whatever can be decided, and refused, on this rank alone."""
    policy = choose(config.engine, world.local_rank)
    filled = fill_preset(config.model, policy.failing_towers)
    if stand_in := stand_in_line(config.model, filled):
        tell(f"{policy.device}: {stand_in}")
    run = with_fusion_decided(config.model_copy(update={"model": filled}))
    stages = [stage_config(run, number) for number in range(max(1, len(expanded(run))))]
    kind = engine_kind(run, world)
    plans = [plan_batch(stage, world.size) for stage in stages]
    for stage in stages:
        optimizer_kind(stage.optim, policy.fused_optimizer, sharded=kind == "deepspeed")
    return _Outline(run, policy, stages, plans, kind)


def _schedule(
    config: Config, plan: BatchPlan, shards: ShardSet, table: Neighbours | None, tell: Tell
) -> Schedule:
    """The order of the stage's data, with what is alike together where a table says what is."""
    if table is None:
        return plan_schedule(config, shards, plan.lanes)
    tell(f"hard batches: neighbours from {config.data.hard_batches.table}")
    schedule = plan_schedule(config, shards, plan.lanes, table)
    tell(f"hard batches: {schedule.with_neighbours:.0%} of the images have neighbours")
    return schedule


def _settle_what_trains(
    model: TwoTower, spec: InputSpec, outline: _Outline, stage: int, tell: Tell
) -> None:
    """Freeze what the stage does not train, and say what is built."""
    check_patterns(model, outline.run)
    for line in select(model, outline.run, stage):
        tell(line)
    tell(f"batch: {outline.plans[stage]}")
    tell(f"device: {outline.policy}")
    for tower in (model.vision, model.text):
        if tower.left_out:
            tell(tower.left_out)
    if unseen := unseen_line(model.vision, spec.image_size):
        tell(unseen)
    if gaps := gaps_line(model, spec, outline.policy):
        tell(gaps)


def _towers(config: Config, origin: Origin | None) -> ModelConfig:
    """`model`, its towers read from a checkpoint that the run goes on from, where it keeps them."""
    if not isinstance(origin, Checkpoint):
        return config.model
    return kept_towers(config.model, origin.config.model, origin.folder, origin.files)


def _model(
    config: Config, towers: ModelConfig, shards: ShardSet, origin: Origin | None
) -> tuple[TwoTower, InputSpec]:
    """The model with its first weights or the origin's, and what it is fed."""
    # An origin holds every weight: none is fetched for a model that it fills.
    wanted = with_scale_fitted(towers, shards.samples)
    model, spec = build_model(wanted, config.data.image_size, config.run.seed, fill=origin is None)
    if origin is not None:
        origin.load_weights(model)
    return model, with_cleaning(spec, config.data.caption_cleaning)


def _restore(
    engine: Engine,
    origin: Origin | None,
    seed: int,
    stage: int,
    world: World,
    policy: DevicePolicy,
) -> None:
    """Moments, loss scale and random numbers as the origin left them, where it has them."""
    # Ranks draw different dropout masks; a resumed run gets each rank's own state back.
    torch.manual_seed(seed * 1_000_003 + stage * 500_009 + world.rank)
    if origin is not None:
        trained = origin.progress.updates - origin.progress.stage_updates
        engine.restore(origin.moments, trained, origin.progress.scaler)
        if random := origin.random(world.rank):
            set_rng_state(policy.device, random)


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


def snapshot(training: Training, progress: Progress) -> Snapshot:
    """What a checkpoint of a run in training holds. Collective."""
    return take_snapshot(
        replace(progress, scaler=training.engine.scaler()),
        training.kept,
        chain(
            training.engine.tensors(),
            training.companions.tensors(),
            training.schedule.tensors(),
        ),
        rng_state(training.policy.device),
        training.world,
    )
