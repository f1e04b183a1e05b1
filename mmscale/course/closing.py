"""Evaluations of a run in training, and its end: last checkpoint, diagnosis and page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmscale.assembly import Training, save_checkpoint
from mmscale.checkpoint.files import Progress
from mmscale.diagnostics.doctor import diagnose
from mmscale.diagnostics.pairs import Pairs
from mmscale.durable import replace_file
from mmscale.evaluation import evaluate
from mmscale.report.page import write_page
from mmscale.report.report import Report


def evaluated(
    training: Training, report: Report, progress: Progress
) -> tuple[Progress, Pairs | None]:
    """Recall on the held-out pairs, reported and kept in the progress. Collective."""
    found = evaluate(training)
    if found is None:
        return progress, None
    figures, pairs = found
    report.evaluation({"step": progress.step, **figures}, pairs)
    return replace(progress, metrics=figures), pairs


def finish(training: Training, report: Report, progress: Progress) -> None:
    """The last evaluation, checkpoint, diagnosis and page. Collective."""
    progress, pairs = evaluated(training, report, progress)
    if progress.step > training.start.step:
        save_checkpoint(training, progress)
    if not training.world.is_main:
        return
    run_dir = Path(training.config.run.dir)
    last: dict[str, Any] = {"step": progress.step, **progress.metrics}
    if pairs is not None:
        diagnosis = diagnose(pairs).to_json()
        replace_file(run_dir / "doctor.json", json.dumps(diagnosis, indent=1).encode())
        report.say(f"verdict: {diagnosis['verdict']} (confidence {diagnosis['confidence']:.2f})")
        last["verdict"] = diagnosis["verdict"]
    report.finish(last)
    report.say(f"report: {write_page(run_dir)}")
