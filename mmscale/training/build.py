"""A stage of a run: its data, model and engine as they are where it starts, and its parts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mmscale.checkpoint.files import BOUND, HEADS, Checkpoint, newest_sound
from mmscale.checkpoint.resume import require_same_run
from mmscale.checkpoint.state import RunState
from mmscale.config.data import OWN_MODEL
from mmscale.config.loss import PrototypesTerm
from mmscale.config.rules import (
    expanded_stages,
    fusion_heads,
    keeps_start,
    needs_momentum,
    needs_momentum_rows,
)
from mmscale.config.schema import Config
from mmscale.config.taught import L2StartTerm
from mmscale.contracts import START, InputSpec
from mmscale.data.caption_text import with_cleaning
from mmscale.data.features import CachedStream, FeatureTable
from mmscale.data.schedule import Schedule
from mmscale.data.stream import TrainStream
from mmscale.engine.before_training import fit_heads, gaps_line
from mmscale.engine.build import build_engine
from mmscale.engine.compiled import caption_lengths, compile_blocks, is_compiled
from mmscale.engine.ema import averaged, copy_of
from mmscale.engine.encode import Encoder
from mmscale.engine.footprint import count_flops
from mmscale.engine.inference import Inference
from mmscale.engine.plan import BatchPlan, is_zero_3
from mmscale.engine.protocol import Engine
from mmscale.errors import CheckpointError, LaunchError
from mmscale.evaluation.encoded import Tell, encoded_sets
from mmscale.loss.objective import Objective
from mmscale.model.batch_norm import connect_batch_norms
from mmscale.model.build import build_model
from mmscale.model.freezing import check_patterns, select
from mmscale.model.scale import with_scale_fitted
from mmscale.model.tower import unseen_line
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import set_rng_state
from mmscale.parallel.peers import gather_objects
from mmscale.preflight import checkpoints_ahead, require_room
from mmscale.training.order import neighbours_of, own_order, schedule_of
from mmscale.training.part import Part
from mmscale.training.parts.anchors import anchors_of
from mmscale.training.parts.balance import ModalityBalancer
from mmscale.training.parts.checkpoints import Checkpoints
from mmscale.training.parts.damage import Damage
from mmscale.training.parts.divergence import Divergence
from mmscale.training.parts.evaluation import Evaluation
from mmscale.training.parts.health import Health
from mmscale.training.parts.matching import Matching
from mmscale.training.parts.momentum import Momentum
from mmscale.training.parts.near_start import NearStart
from mmscale.training.parts.non_finite import NonFinite
from mmscale.training.parts.prototypes import EpochClusters
from mmscale.training.parts.queue import Queue, RowBank
from mmscale.training.parts.retention import Retention
from mmscale.training.parts.start import Begun, begun
from mmscale.training.parts.stopping import Stopping
from mmscale.training.parts.teacher import Teachers
from mmscale.training.prepare import towers_of
from mmscale.training.stage import Job, Services, Stage, Start, Timetable
from mmscale.training.step import Learner
from mmscale.training.teachers import (
    Teacher,
    cached_features,
    fed_with,
    open_teachers,
    taught_terms,
)


def build_stage(job: Job, start: Start, say: Tell) -> Stage:
    """A stage's data, model and engine, as they are where it starts. Collective.

    Args:
        job: The run.
        start: Where the stage begins.
        say: Takes a line about what is built, as it is built.
    """
    number = start.state.stage
    config, plan = job.stages[number], job.plans[number]
    start = replace(start, state=replace(start.state, lanes=plan.lanes))
    table = neighbours_of(config, job.world, start)
    schedule = schedule_of(job, number, table, say)
    model, spec = _model(job, config, start)
    if start.checkpoint is not None and start.checkpoint is job.source:
        # A model of another kind has told itself by its tensors.
        _require_same_run(job, start.checkpoint)
    _freeze(job, number, model, spec, say)
    timetable = _timetable(job, plan, schedule, start.state)
    ahead = checkpoints_ahead(config, timetable.total_steps - start.state.step, timetable.uncut)
    require_room(config, model, ahead, needs_momentum(config), job.world, keeps_start(job.config))
    teachers = open_teachers(config, job.world, say)
    compiled = _is_compiled(job, config, timetable)
    spec = _with_lengths(spec, compiled or job.policy.runs_ahead)
    inference = Inference(model, job.policy)
    encoder = Encoder.of(config, inference.call, inference.device, spec, job.peers)
    features, sets = encoded_sets(config, model, encoder, job.shards, say)
    tables = cached_features(config, teachers, job.shards, job.policy, job.peers, say)
    fed = fed_with(spec, teachers, tables)
    stream = _stream(job, config, schedule, fed, features, tables)
    if start.is_fresh or start.draws_heads:
        fit_heads(model, inference, stream, job.peers, plan.micro_rows, spec)
    if config.data.hard_batches.table == OWN_MODEL and table is None:
        stream.schedule = own_order(job, number, encoder, features, say)
    connect_batch_norms(model, job.peers)
    model.scale.follow(timetable.uncut)
    follower = _follower(job, config, model, start)
    if keeps_start(job.config):
        teachers += (begun(model, spec, config.model.embed_dim, start),)
    if compiled:
        say(_compile(model, follower))
    is_counted = features is None and job.world.is_main  # cached features do not pass the towers
    flops = count_flops(model.train(), spec) if is_counted else None
    engine = build_engine(job.kind, model.train(), config, plan, job.policy, job.world)
    _restore(engine, start, job)
    return Stage(
        job=job,
        config=config,
        plan=plan,
        learner=_learner(job, config, plan, engine, timetable),
        follower=follower,
        teachers=teachers,
        stream=stream,
        spec=spec,
        sets=sets,
        flops=flops,
        timetable=timetable,
        start=start,
        end=_end(job, start.state),
    )


def build_parts(stage: Stage, services: Services) -> tuple[Part, ...]:
    """Whatever else the stage needs, as its start left it, in the order of their collectives.

    Raises:
        LaunchError: Ranks built different ones.
    """
    momentum = _momentum(stage)
    retention = Retention(stage, services.report) if stage.config.retain.sets else None
    evaluation = Evaluation(stage, services, momentum, retention)
    parts: list[Part] = [
        *([momentum] if momentum else []),
        *_queue(stage),
        *_prototypes(stage),
        *_teachers(stage),
        *anchors_of(stage, services.report.say),
        *_matching(stage),
        *_balance(stage),
        NonFinite(stage, services, evaluation),
        _divergence(stage),
        Damage(stage.config.data, stage.stream.schedule.items, stage.job.world, services.report),
        Health(stage, services),
        *([retention] if retention else []),
        evaluation,
        Stopping(stage.config, _patience(stage), evaluation, services.report),
    ]
    parts.append(Checkpoints(stage, services, parts, evaluation))
    names = [part.name for part in parts]
    if any(theirs != names for theirs in gather_objects(stage.job.world, names)):
        raise LaunchError(
            f"the ranks' parts differ ({', '.join(names)} on rank {stage.job.world.rank}); start "
            "every rank with the same words and files"
        )
    for part in parts:
        _load(part, stage.start)
    return tuple(parts)


def _load(part: Part, start: Start) -> None:
    """Give a part what it remembered."""
    try:
        if part.name in start.parts:
            part.load(start.parts[part.name])
        if part.has_tensors and start.checkpoint:
            part.restore(start.checkpoint.tensors_of(part.name))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{start.checkpoint.folder if start.checkpoint else 'the stage before'}: what it keeps "
            f"of {part.name} is not what this mmscale writes ({error})"
        ) from error


def _momentum(stage: Stage) -> Momentum | None:
    if stage.follower is None:
        return None
    config, queue = stage.config, stage.config.negatives.queue
    return Momentum(
        stage.learner.engine.shadow(stage.follower),
        stage.job.policy,
        config.model.momentum,
        stage.plan.micro_rows,
        needs_momentum_rows(config) or (queue.size != 0 and queue.source == "momentum"),
    )


def _queue(stage: Stage) -> Iterator[Queue]:
    queue, engine = stage.config.negatives.queue, stage.learner.engine
    size, unique = queue.slots(stage.job.shards.samples)
    if size:
        share = partial(queue.share.at, steps_of=stage.timetable.uncut)
        bank = RowBank(size, stage.config.model.embed_dim, unique, engine.device)
        yield Queue(bank, stage.job.peers, share, queue.source == "momentum")


def _prototypes(stage: Stage) -> Iterator[EpochClusters]:
    job, terms = stage.job, stage.config.loss.terms
    for term in [term for term in terms if isinstance(term, PrototypesTerm)][:1]:
        yield EpochClusters(
            term,
            job.shards.samples,
            stage.timetable.epoch_steps,
            stage.config.run.seed,
            job.world,
            job.peers,
            stage.learner.engine.device,
        )


def _teachers(stage: Stage) -> Iterator[Part]:
    terms = taught_terms(stage.config)
    for start in (teacher for teacher in stage.teachers if teacher.name == START):
        yield Begun(start)
        yield from _near(stage, start)
    if named := [teacher for teacher in stage.teachers if teacher.name in terms]:
        yield Teachers(
            named,
            terms,
            stage.job.policy,
            stage.spec,
            stage.plan.micro_rows,
            stage.timetable.uncut,
        )


def _near(stage: Stage, start: Teacher) -> Iterator[NearStart]:
    for term in (term for term in stage.config.loss.terms if isinstance(term, L2StartTerm)):
        yield NearStart(
            term,
            stage.learner.engine,
            start.model.state_dict(),
            stage.job.world.size,
            stage.timetable.uncut,
        )


def _matching(stage: Stage) -> Iterator[Matching]:
    if heads := fusion_heads(stage.config):
        seed, rows = stage.config.run.seed, stage.plan.micro_rows
        yield Matching(stage.learner.engine.call, seed, rows, negatives="matching" in heads)


def _balance(stage: Stage) -> Iterator[ModalityBalancer]:
    if stage.config.optim.balance.band is not None:
        yield ModalityBalancer(stage.config.optim.balance, stage.learner.engine, stage.job.peers)


def _divergence(stage: Stage) -> Divergence:
    return Divergence(stage.config.stop, stage.timetable.steps(stage.config.optim.warmup))


def _patience(stage: Stage) -> int | None:
    stages = expanded_stages(stage.job.config)
    return stages[stage.start.state.stage].patience if stages else None


def _timetable(job: Job, plan: BatchPlan, schedule: Schedule, state: RunState) -> Timetable:
    left = 0 if state.over == "run" else sum(job.lengths[state.stage + 1 :])
    return Timetable(schedule.steps, plan.global_rows, _end(job, state) + left)


def _end(job: Job, state: RunState) -> int:
    return state.step if state.over else state.stage_start + job.lengths[state.stage]


def _model(job: Job, config: Config, start: Start) -> tuple[TwoTower, InputSpec]:
    """The model with its first weights or the start's, and what it is fed."""
    # No weights are fetched for a model that the start fills.
    wanted = with_scale_fitted(towers_of(config.model, _source(job, start)), job.shards.samples)
    size, seed = config.data.image_size, config.run.seed
    model, spec = build_model(wanted, size, seed, fill=start.is_fresh)
    if start.weights is not None:
        with torch.no_grad():
            for name, own in model.state_dict().items():
                own.copy_(start.weights[name])
    elif start.checkpoint is not None:
        start.checkpoint.load_weights(model)
    elif start.first_weights is not None:
        kept = (BOUND, HEADS) if start.draws_heads else (BOUND,)
        start.first_weights.load_weights(model, kept)
        model.scale.begin_within(f"model.weights={config.model.weights}")
    return model, with_cleaning(spec, config.data.caption_cleaning)


def _source(job: Job, start: Start) -> Checkpoint | None:
    """The checkpoint that keeps the towers' files, where the run did not begin without one."""
    if start.checkpoint is not None or job.source is None or job.source.folder.is_dir():
        return start.checkpoint or job.source
    # The run has gone on for so long that the one it went on from is no longer kept.
    return newest_sound(job.folder, job.world)


def _freeze(job: Job, number: int, model: TwoTower, spec: InputSpec, say: Tell) -> None:
    """Freeze what the stage does not train, and say what is built."""
    check_patterns(model, job.config)
    for line in select(model, job.config, number):
        say(line)
    say(f"batch: {job.plans[number]}")
    say(f"device: {job.policy}")
    for tower in (model.vision, model.text):
        if tower.left_out:
            say(tower.left_out)
    if unseen := unseen_line(model.vision, spec.image_size):
        say(unseen)
    if gaps := gaps_line(model, spec, job.policy):
        say(gaps)


def _follower(job: Job, config: Config, model: nn.Module, start: Start) -> nn.Module | None:
    """What becomes the momentum encoder; taken before an engine shards the model."""
    if not needs_momentum(config):
        return None
    follower = copy_of(model, share_frozen=not is_zero_3(config, job.kind))
    if start.checkpoint is not None:
        start.checkpoint.load_momentum(averaged(follower, model))
    return follower


def _stream(
    job: Job,
    config: Config,
    schedule: Schedule,
    spec: InputSpec,
    features: FeatureTable | None,
    of_teachers: Mapping[str, FeatureTable],
) -> TrainStream | CachedStream:
    shards, world, device = job.shards, job.world, job.policy.device
    if features is None:
        return TrainStream(config, shards, schedule, spec, world, device, of_teachers)
    return CachedStream(schedule, shards, features, world, of_teachers)


def _require_same_run(job: Job, checkpoint: Checkpoint) -> None:
    lanes = [plan.lanes for plan in job.plans]
    require_same_run(checkpoint, job.config, job.kept.contents, lanes)


def _learner(
    job: Job, config: Config, plan: BatchPlan, engine: Engine, timetable: Timetable
) -> Learner:
    objective = Objective(config, job.peers, timetable.uncut)
    return Learner(engine, objective, job.peers, plan.micro_rows)


def _is_compiled(job: Job, config: Config, timetable: Timetable) -> bool:
    choice, updates = config.engine.compile, timetable.total_steps
    return not is_zero_3(config, job.kind) and is_compiled(choice, job.policy, updates)


def _with_lengths(spec: InputSpec, wanted: bool) -> InputSpec:
    lengths = caption_lengths(spec.context_length) if wanted else ()
    return replace(spec, caption_lengths=lengths)


def _compile(*models: Any) -> str:
    """Compile the blocks of the models' towers; what to tell of it."""
    towers = [tower for model in models if model for tower in (model.vision, model.text)]
    return f"compiled when first called: {compile_blocks(towers)} transformer blocks"


def _restore(engine: Engine, start: Start, job: Job) -> None:
    """Moments, loss scale and random numbers as the start has them."""
    rank, checkpoint = job.world.rank, start.checkpoint
    # Ranks draw different dropout masks; a resumed run gets each rank's own state back.
    torch.manual_seed(job.config.run.seed * 1_000_003 + start.state.stage * 500_009 + rank)
    if checkpoint is None:
        return
    trained = checkpoint.state.updates - checkpoint.state.stage_updates
    engine.restore(checkpoint.moments, trained, checkpoint.state.scaler)
    if random := checkpoint.random(rank):
        set_rng_state(job.policy.device, random)
