"""Train a dual encoder: the file that launchers start. Functions only; read it from the top.

deepspeed mmscale/train.py CONFIG key=value ...      accelerate launch mmscale/train.py CONFIG ...
"""

import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mmscale.config.load import load_config
from mmscale.config.schema import Config
from mmscale.dist.signals import heeding_signals
from mmscale.errors import saying_how_to_go_on

if TYPE_CHECKING:
    from mmscale.assembly import Segment, Training
    from mmscale.checkpoint.state import Progress
    from mmscale.contracts import Batch, Position
    from mmscale.course.run import Run
    from mmscale.course.trace import Trace
    from mmscale.engine.step import Update

Batches: TypeAlias = "Generator[tuple[Batch, Position, float], None, None]"


def main(words: Sequence[str]) -> int:
    """Run the words of a command line; returns the exit code."""
    # A mistake in the configuration is told before torch is imported.
    return heeding_signals(lambda: run(load_config(words)))


def run(config: Config) -> int:
    """Train as configured, on every rank that was started; all of them fail together."""
    # Before torch: workers fork, and OpenMP threads that spin starve a decoding worker of its core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Blocks as large as a batch in pages of 2 MB: a fault for every 4 KiB costs more than the copy.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # The number of decoding processes is the user's setting, not a mistake to warn of on each rank.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # What imports leave stays to the end: to search it for garbage took a seventh of their time.
    gc.disable()
    with saying_how_to_go_on(lambda: _way_on(config)):
        from mmscale.dist.fallback import starting_again_on_cpu

        return starting_again_on_cpu(config, _attempt)


def _attempt(config: Config, updated: Callable[[], None]) -> int:
    """One run from start to end; calls `updated` after each update."""
    from mmscale.dist.failure import failing_together, wait_for
    from mmscale.dist.world import leave, promised_world

    world = promised_world()
    with failing_together(world), ExitStack() as held:
        from mmscale.assembly import Segment, assemble
        from mmscale.checkpoint.lock import RunLock
        from mmscale.checkpoint.saver import Saver
        from mmscale.course.run import Run
        from mmscale.dist.signals import StopSignal
        from mmscale.dist.watchdog import Watchdog
        from mmscale.report.console import early_line
        from mmscale.report.report import Report

        gc.enable()
        stop = StopSignal(at_once=True)
        lock = held.enter_context(RunLock(Path(config.run.dir)))
        training = assemble(Segment(config, lock=lock), world, early_line(world))
        _write_config(training)
        with Report(training.config, world, training.total_steps, training.start.step) as report:
            saver = Saver(Path(config.run.dir), world, config.checkpoint, report.warn)
            wait_for(saver.wait)
            watchdog = Watchdog(world, config.engine.timeout)
            run = Run(report, stop, saver, watchdog, updated)
            while (following := _segment(training, run)) is not None:
                training = assemble(following, world, report.say)
    leave()
    return 0


def _segment(training: "Training", run: "Run") -> "Segment | None":
    """Train with one configuration and engine; returns what the run goes on as, None at its end."""
    from mmscale.course.closing import finish
    from mmscale.course.stages import next_stage
    from mmscale.course.trace import Trace
    from mmscale.report.lines import opening_lines

    for line in opening_lines(training):
        run.report.say(line)
    traced = training.config.log.profile
    # Closed, so that decoding processes end here and not when their loader is collected.
    with (
        closing(_batches(training, run)) as batches,
        Trace(training, None if traced is None else training.steps(traced)) as trace,
        run.watchdog,
    ):
        progress, following = _loop(training, run, trace, batches)
    following = following or next_stage(training, progress)
    if following is None:
        finish(training, run, progress)
    training.close()
    return following


def _loop(
    training: "Training", run: "Run", trace: "Trace", batches: "Batches"
) -> tuple["Progress", "Segment | None"]:
    """Update until the segment ends; returns how far it came, and what follows before the end."""
    from mmscale.course.settle import Settling
    from mmscale.course.watch import plateau_factor
    from mmscale.data.caption_text import unknown_words
    from mmscale.dist.phases import PhaseClock
    from mmscale.engine.balance import ModalityBalancer
    from mmscale.engine.schedule import rate_factor
    from mmscale.engine.step import update
    from mmscale.report.lines import (
        first_batch_line,
        repeats_warning,
        rows_of,
        training_line,
    )

    config, report = training.config, run.report
    length = training.end - training.start.stage_start
    warmup = training.steps(config.optim.warmup)
    settling = Settling(training, run, warmup)
    progress = settling.begin()
    phases = PhaseClock(training.policy.device)
    balancer = ModalityBalancer(
        config.optim.balance, training.engine, training.peers, progress.watched
    )
    clock = time.perf_counter()
    for batch, position, waited in () if progress.over else batches:
        if progress.step == training.start.step:
            report.say(first_batch_line(batch))
            if told := repeats_warning(batch, config.data):
                report.warn(told)
            if line := unknown_words(training.spec, rows_of(batch), training.peers):
                report.warn(line)
        step = progress.step - progress.stage_start
        factor = rate_factor(step, length, warmup, config.optim.schedule)
        factor *= plateau_factor(training, progress)
        balancer.before(step)
        is_probed = settling.before(progress)
        is_logged = training.due(config.log.every, progress.step + 1)
        with phases.timing(is_logged):
            done = update(
                training.engine,
                training.objective,
                training.peers,
                batch,
                training.plan.micro_rows,
                config.optim.lr * factor,
                factor,
                step,
                run.stop.wanted,
                training.companions,
                run.saver.written,
                is_logged or is_probed,
            )
        run.updated()
        trace.step()
        progress = _advance(progress, position, done, training.plan.global_rows)
        state = balancer.after(done.record.applied)
        progress = replace(progress, watched={**progress.watched, **state})
        seconds = time.perf_counter() - clock
        if is_logged:
            spent = {"data": waited, **phases.seconds}
            report.training(training_line(training, progress, done, seconds, spent, batch))
        progress, following = settling.after(progress, done, batch)
        if following is not None or progress.over:
            return progress, following
        clock = time.perf_counter()
    return progress, None


def _batches(training: "Training", run: "Run") -> "Batches":
    """The segment's batches on the device, the position after each, and the seconds waited."""
    from mmscale.engine.feed import on_device

    stream = training.stream.batches(training.start.position)
    for step in range(training.start.step + 1, training.end + 1):
        run.watchdog.alive(f"the wait for the batch of step {step}")
        start = time.perf_counter()
        batch, position = next(stream)
        # What is trained from here on is lost without a checkpoint.
        run.stop.note_from_now()
        batch = on_device(batch, training.policy.device, training.spec)
        run.watchdog.alive(f"the update of step {step}", in_exchange=True)
        yield batch, position, time.perf_counter() - start


def _advance(progress: "Progress", position: "Position", done: "Update", rows: int) -> "Progress":
    before = progress.damaged if progress.position.rows else 0
    return replace(
        progress,
        step=progress.step + 1,
        updates=progress.updates + done.record.applied,
        position=position,
        damaged=before + done.record.damaged,
        samples=progress.samples + rows,
    )


def _way_on(config: Config) -> str:
    """How a run that a signal has ended goes on; torch need not be there yet."""
    kept = sorted(Path(config.run.dir).glob("checkpoints/step-" + 8 * "[0-9]"))
    if not kept:
        features = ", with the features computed so far" if config.data.feature_cache else ""
        return f"no checkpoint was written yet, the same command begins anew{features}"
    command = "the same command"
    if config.run.resume == "never":
        command += " with run.resume=auto"
    return f"{command} goes on from step {int(kept[-1].name.removeprefix('step-'))}"


def _write_config(training: "Training") -> None:
    from mmscale.config.yaml import as_yaml
    from mmscale.outputs import write_output

    if training.world.is_main:
        path = Path(training.config.run.dir) / "config.yaml"
        write_output("run.dir", path, as_yaml(training.run.model_dump(mode="json")).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
