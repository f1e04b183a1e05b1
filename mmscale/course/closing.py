"""Evaluations of a run in training, and its end: last checkpoint, diagnosis and page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmscale.assembly import Training, snapshot
from mmscale.checkpoint.state import Best, Progress
from mmscale.config.schema import CheckpointConfig
from mmscale.course.run import Run
from mmscale.diagnostics.doctor import diagnose
from mmscale.diagnostics.in_training import InTraining
from mmscale.diagnostics.pairs import Pairs
from mmscale.dist.peers import from_all
from mmscale.durable import replace_file
from mmscale.errors import ConfigError, Stop, TerminatedError
from mmscale.evaluation import evaluate
from mmscale.report.choosing import choose_examples
from mmscale.report.metrics import read_metrics
from mmscale.report.page import write_page


def evaluated(training: Training, run: Run, progress: Progress) -> tuple[Progress, Pairs | None]:
    """Recall on the held-out pairs, reported and kept in the progress. Collective.

    Raises:
        Stop: A rank was told to end; all of them leave after the same batch.
    """

    def heard(done: int, total: int) -> None:
        run.watchdog.alive(f"the evaluation after {done} of {total}")
        if any(from_all(training.world, run.stop.wanted)):
            raise Stop

    found = evaluate(training, heard)
    if found is None:
        return progress, None
    figures, pairs = found
    run.report.evaluation({"step": progress.step, **figures}, pairs)
    best = _best(training.config.checkpoint, progress, figures)
    return replace(progress, metrics=figures, best=best), pairs


def _best(settings: CheckpointConfig, progress: Progress, figures: dict[str, float]) -> Best | None:
    """The best evaluation, with the new one in view."""
    if settings.best is None:
        return None
    if settings.best not in figures:
        raise ConfigError(
            f"checkpoint.best={settings.best}: the evaluation measures {', '.join(figures)}; name "
            "one of these"
        )
    now, before = Best(settings.best, figures[settings.best], progress.step), progress.best
    if before is None or before.metric != now.metric:
        return now
    better = now.value > before.value if settings.best_is == "max" else now.value < before.value
    return now if better else before


def finish(training: Training, run: Run, progress: Progress) -> None:
    """The last evaluation, checkpoint, diagnosis and page. Collective.

    Raises:
        TerminatedError: The run was told to stop; a checkpoint is written.
    """
    try:
        progress, pairs = evaluated(training, run, progress)
    except Stop:
        # Started again the run makes this evaluation, and ends.
        _save_last(training, run, progress)
        raise TerminatedError(
            f"told to stop; step {progress.step} is in a checkpoint, and the evaluation at the end "
            "is made when the same command runs again"
        ) from None
    _save_last(training, run, progress)
    if training.world.is_main:
        with run.stop.at_once():
            _tell_the_end(training, run, progress, pairs)


def _save_last(training: Training, run: Run, progress: Progress) -> None:
    # A run of no steps keeps what it began with.
    if progress.step > training.start.step or progress.step == 0:
        run.saver.save(snapshot(training, progress), training.is_kept)
    run.saver.finish()


def _tell_the_end(training: Training, run: Run, progress: Progress, pairs: Pairs | None) -> None:
    """Diagnosis and page, on the main rank."""
    report, run_dir = run.report, Path(training.config.run.dir)
    last: dict[str, Any] = {"step": progress.step, **progress.metrics}
    held_out = training.held_out
    if pairs is not None and held_out is not None:
        own = InTraining.last_of(read_metrics(run_dir / "metrics.jsonl"))
        diagnosis = diagnose(pairs, own).to_json()
        replace_file(run_dir / "doctor.json", json.dumps(diagnosis, indent=1).encode())
        report.say(f"verdict: {diagnosis['verdict']} (confidence {diagnosis['confidence']:.2f})")
        last["verdict"] = diagnosis["verdict"]
        if training.config.log.page:
            choose_examples(pairs, held_out.shards, report.warn).write(run_dir)
    report.finish(last)
    if not training.config.log.page:
        return
    page = write_page(run_dir)
    report.page(page)
    report.say(f"report: {page.path}")
