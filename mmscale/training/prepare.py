"""What all stages of a run share, and where it begins: decided and compared before it is built."""

import os
from dataclasses import replace

import torch

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.lock import RunLock
from mmscale.checkpoint.resume import first_weights
from mmscale.checkpoint.state import RunState
from mmscale.config.load import stage_config
from mmscale.config.model import ModelConfig
from mmscale.config.rules import (
    expanded_stages,
    with_fusion_decided,
)
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.engine.before_training import update_fault
from mmscale.engine.optimizer import optimizer_kind
from mmscale.engine.plan import engine_kind, is_zero_3, plan_batch, stage_lengths
from mmscale.errors import ConfigError
from mmscale.evaluation.encoded import Tell
from mmscale.loss.product import require_precision
from mmscale.model.kept import kept_towers, tower_files
from mmscale.model.presets import fill_preset, stand_in_line
from mmscale.parallel.device import DevicePolicy, choose
from mmscale.parallel.peers import connect
from mmscale.parallel.world import join_ranks, local_ranks
from mmscale.preflight import begin, require_outputs
from mmscale.training.stage import Job, Start


def prepare(config: Config, lock: RunLock, world: World, say: Tell) -> tuple[Job, Start]:
    """What all stages share, and where the run begins or goes on. Collective.

    Args:
        config: The run's, as the user wrote it.
        lock: Taken before anything looks into the run's folder.
        world: The launcher's promise.
        say: Takes a line about what is decided.
    """
    policy = choose(config.engine, world.local_rank)
    run = _filled(config, policy, say)
    if policy.has_gaps and (fault := update_fault(run, policy)):
        # Nothing is built yet: the run is built on the CPU as if it had been asked for.
        say(f"an update failed on {policy.device} ({fault}); the run is built on the CPU")
        engine = config.engine.model_copy(update={"device": "cpu"})
        config = config.model_copy(update={"engine": engine})
        policy = choose(config.engine, world.local_rank)
        run = _filled(config, policy, say)
    kind = engine_kind(run, world)
    _require_whole_weights(run, kind)
    stages = tuple(stage_config(run, number) for number in range(max(1, len(expanded_stages(run)))))
    plans = tuple(plan_batch(stage, world.size) for stage in stages)
    for stage in stages:
        zero = kind == "deepspeed"
        optimizer_kind(stage.optim, policy.fused_optimizer, zero or world.size > 1, flat=zero)
        require_precision(stage.loss.precision, policy.device)
    _share_cores(policy, world)
    join_ranks(world, policy.backend, run.engine.timeout, alone_too=kind == "deepspeed")
    require_outputs(run, world)
    shards = open_train(run.data, say)
    lanes = [plan.lanes for plan in plans]
    origin, kept = begin(run, lanes, shards, lock, world, say)
    schedule = plan_schedule(stages[0], shards, lanes[0])
    first = None if origin else first_weights(run.model)
    source = origin or (first if isinstance(first, Checkpoint) else None)
    if world.is_main:
        kept = replace(kept, attached=tower_files(towers_of(run.model, source)))
    job = Job(
        config=run,
        stages=stages,
        plans=plans,
        kind=kind,
        policy=policy,
        world=world,
        peers=connect(world),
        shards=shards,
        schedule=schedule,
        lengths=tuple(stage_lengths(run, stages, schedule.items)),
        kept=kept,
        source=source,
    )
    if origin is None:
        draws = False
        if first is not None and run.model.head.weights == "random":
            draws = True
            say(f"model.head.weights=random: heads are drawn anew, all else is of {first.folder}")
        return job, Start(
            RunState(), {}, first_weights=first, draws_heads=draws and first is not None
        )
    return job, Start(origin.state, origin.parts, origin)


def _filled(config: Config, policy: DevicePolicy, say: Tell) -> Config:
    """The configuration with all that is left to presets and to what is there."""
    filled = fill_preset(config.model, policy.failing_towers)
    if stand_in := stand_in_line(config.model, filled):
        say(f"{policy.device}: {stand_in}")
    return with_fusion_decided(config.model_copy(update={"model": filled}))


def towers_of(model: ModelConfig, source: Checkpoint | None) -> ModelConfig:
    """`model`, its towers read from a checkpoint that keeps them."""
    if source is None:
        return model
    return kept_towers(model, source.config.model, source.folder, source.files)


def _require_whole_weights(run: Config, kind: str) -> None:
    """Refuse compiled blocks whose weights are gathered within them."""
    if is_zero_3(run, kind) and run.engine.compile == "blocks":
        raise ConfigError(
            "engine.compile=blocks under ZeRO-3, which gathers weights while a block runs: set "
            "engine.compile=off, or engine.deepspeed to stage 1 or 2"
        )


def _share_cores(policy: DevicePolicy, world: World) -> None:
    """Ranks on one machine's CPU share its cores, unless the user said how."""
    local = local_ranks(world)
    if policy.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and local > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
