"""The training loop: stages of a run, one after another, and the updates of each."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from mmscale.checkpoint.lock import RunLock
from mmscale.checkpoint.mirror import Mirror
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import RunState
from mmscale.config.load import as_yaml
from mmscale.config.schema import Config
from mmscale.contracts import START, Batch, Position, World
from mmscale.data.caption_text import unknown_words
from mmscale.engine.feed import feed
from mmscale.engine.optimizer import rate_factor
from mmscale.errors import HaltError
from mmscale.outputs import write_output
from mmscale.parallel.failure import Watchdog, wait_for
from mmscale.parallel.phases import Trace
from mmscale.parallel.signals import StopSignal
from mmscale.report.console import early_line
from mmscale.report.report import Report
from mmscale.training.build import build_parts, build_stage
from mmscale.training.finish import finish
from mmscale.training.lines import (
    first_batch_line,
    opening_lines,
    repeats_warning,
    rows_of,
    training_line,
)
from mmscale.training.part import Event, Halt, Part, Rollback, StageOver, Step
from mmscale.training.parts.checkpoints import Checkpoints
from mmscale.training.parts.evaluation import Evaluation
from mmscale.training.prepare import prepare
from mmscale.training.stage import Job, Services, Stage, Start
from mmscale.training.step import Arrival, Flights

Batches: TypeAlias = Generator[tuple[Batch, Position, float], None, None]


def train(config: Config, world: World, mirror: Mirror) -> None:
    """Train as configured, stage after stage, to the run's end. Collective.

    Args:
        config: The run's, as the user wrote it.
        world: The launcher's promise.
        mirror: Copies the run's folder from here on.

    Raises:
        MmscaleError: The run cannot be built, or ends early.
    """
    stop, say = StopSignal(at_once=True), early_line(world)
    with RunLock(Path(config.run.dir)) as lock:
        job, begin = prepare(config, lock, world, say)
        stage = build_stage(job, begin, say)
        if world.is_main:
            content = as_yaml(job.config.model_dump(mode="json")).encode()
            write_output("run.dir", job.folder / "config.yaml", content)
        mirror.start(say)
        total, begun = stage.timetable.total_steps, begin.state.step
        with Report(stage.config, world, total, begun) as report:
            saver = Saver(job.folder, world, config.checkpoint, report.warn)
            wait_for(saver.wait)
            services = Services(report, stop, saver, Watchdog(world, config.engine.timeout))
            while (start := train_stage(stage, services)) is not None:
                stage = build_stage(job, start, report.say)


def train_stage(stage: Stage, services: Services) -> Start | None:
    """Train a stage to its end; returns where the run goes on, None where it is complete.

    Raises:
        HaltError: A part says that the run is to end; its checkpoint is written.
    """
    parts, report = build_parts(stage, services), services.report
    for line in opening_lines(stage):
        report.say(line)
    # Closed, so that decoding processes end here and not when their loader is collected.
    with closing(_batches(stage, services)) as batches, _trace(stage) as trace, services.watchdog:
        state, event = _asked([part.begin for part in parts], stage.start.state)
        flights = Flights(stage.learner, state)
        for batch, position, waited in () if state.over or event else batches:
            if flights.ahead.step == stage.start.state.step:
                _tell_first_batch(stage, services, batch)
            step = _next_step(stage, services, parts, flights.ahead)
            flights.launch(batch, step, parts, position, waited)
            trace.step()
            for arrival in flights.arrived():
                result = arrival.result
                state = _advanced(state, arrival, stage.plan.global_rows)
                if arrival.step.is_logged:
                    report.training(training_line(stage, parts, result, state, arrival.spent))
                state, event = _asked([partial(part.observe, result) for part in parts], state)
                if event is not None:
                    break
            if event is not None:
                break
    return _end_stage(stage, services, parts, state, event)


def _trace(stage: Stage) -> Trace:
    length = stage.config.log.profile
    folder = stage.job.folder if stage.job.world.is_main else None
    return Trace(folder, None if length is None else stage.timetable.steps(length))


def _next_step(stage: Stage, services: Services, parts: Sequence[Part], state: RunState) -> Step:
    """The coming update: its rate, and what it has to agree on and to measure."""
    is_logged = stage.timetable.is_due(stage.config.log.every, state.step + 1)
    optim, length = stage.config.optim, stage.end - state.stage_start
    warmup = stage.timetable.steps(optim.warmup)
    factor = rate_factor(state.step - state.stage_start, length, warmup, optim.schedule)
    for part in parts:
        factor *= part.rate()
    return Step(
        state,
        lr=optim.lr * factor,
        factor=factor,
        stop=services.stop.wanted,
        written=services.saver.written,
        is_measured=is_logged or any(part.measures(state) for part in parts),
        is_logged=is_logged,
        waits=state.step + 1 == stage.end or any(part.waits(state) for part in parts),
    )


def _end_stage(
    stage: Stage, services: Services, parts: Sequence[Part], state: RunState, event: Event | None
) -> Start | None:
    if isinstance(event, Halt):
        _save(parts, state)
        services.saver.finish()
        raise HaltError(event.sentence)
    start = _next_start(stage, parts, state, event)
    if start is None:
        finish(stage, services, parts, state)
    for part in parts:
        part.close()
    stage.learner.engine.close()
    return start


def _tell_first_batch(stage: Stage, services: Services, batch: Batch) -> None:
    """A look at what really reaches the model, and what is odd about it. Collective."""
    services.report.say(first_batch_line(batch))
    repeats = repeats_warning(batch, stage.config.data)
    unknown = unknown_words(stage.spec, rows_of(batch), stage.job.peers)
    for warning in filter(None, (repeats, unknown)):
        services.report.warn(warning)


def _asked(
    questions: Sequence[Callable[[RunState], Event | None]], state: RunState
) -> tuple[RunState, Event | None]:
    """Each part's own question, in order; the first event is what the run does next."""
    event: Event | None = None
    for question in questions:
        found = question(state)
        if isinstance(found, Rollback | Halt):
            return state, found
        if isinstance(found, StageOver):
            # Said in a checkpoint that a later part writes.
            event, state = found, replace(state, over=found.what)
    return state, event


def _batches(stage: Stage, services: Services) -> Batches:
    """The stage's batches on the device, the position after each, and the seconds waited."""
    state, watchdog = stage.start.state, services.watchdog
    stream = stage.stream.batches(state.position)
    with closing(feed(stream, stage.job.policy, stage.spec)) as batches:
        for step in range(state.step + 1, stage.end + 1):
            watchdog.alive(f"the wait for the batch of step {step}")
            start = time.perf_counter()
            batch, position = next(batches)
            # What is trained from here on is lost without a checkpoint.
            services.stop.note_from_now()
            watchdog.alive(f"the update of step {step}", in_exchange=True)
            yield batch, position, time.perf_counter() - start


def _advanced(state: RunState, arrival: Arrival, rows: int) -> RunState:
    before = state.damaged if state.position.rows else 0
    return replace(
        state,
        step=state.step + 1,
        updates=state.updates + arrival.result.record.applied,
        position=arrival.position,
        damaged=before + arrival.result.record.damaged,
        samples=state.samples + rows,
    )


def _save(parts: Sequence[Part], state: RunState) -> None:
    for part in parts:
        if isinstance(part, Checkpoints):
            part.save(state)


def _next_start(
    stage: Stage, parts: Sequence[Part], state: RunState, event: Event | None
) -> Start | None:
    """Where the run goes on after a stage. Collective where another stage follows."""
    (evaluation,) = (part for part in parts if isinstance(part, Evaluation))
    state = replace(state, best=evaluation.best)
    if isinstance(event, Rollback):
        past = event.checkpoint.state
        state = replace(state, updates=past.updates, stage_updates=past.stage_updates)
        return Start(state, {part.name: part.state() for part in parts}, event.checkpoint)
    job, number = stage.job, state.stage + 1
    if state.over == "run" or number >= len(job.stages):
        return None
    state = replace(
        state,
        stage=number,
        stage_start=state.step,
        stage_updates=state.updates,
        position=_first_position(job, number, state.position),
        over="",
        scaler={},
    )
    lasting = {part.name: part.state() for part in parts if part.lasts == "run"}
    weights = {
        tensor.name: tensor.value.detach().cpu().clone()
        for tensor in stage.learner.engine.tensors()
    }
    begun = next((t.model.state_dict() for t in stage.teachers if t.name == START), None)
    return Start(state, lasting, weights=weights, begun=begun)


def _first_position(job: Job, number: int, position: Position) -> Position:
    """Where a stage's data begins: in a new pass where its batches are made up otherwise."""
    before, after = job.stages[number - 1], job.stages[number]
    same = (
        before.train.global_batch_size == after.train.global_batch_size
        and before.data.hard_batches == after.data.hard_batches
    )
    return position if same or not position.rows else Position(position.epoch + 1, 0)
