"""What a run does about a verdict that has lasted: say so, or end.

Every rank calls this alike; what it decides from is the same on all of them.
"""

import json
from pathlib import Path

from mmscale.assembly import Training, snapshot
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import Progress
from mmscale.diagnostics.persistence import Alarm
from mmscale.durable import replace_file
from mmscale.errors import HaltError
from mmscale.report.report import Report


def respond(
    alarm: Alarm, training: Training, report: Report, saver: Saver, progress: Progress
) -> None:
    """Do what `guard.action` says. Collective.

    Args:
        alarm: The verdict.
        training: The segment.
        report: The run's voice.
        saver: Writes checkpoints.
        progress: Where the run is.

    Raises:
        HaltError: The run is to end; its checkpoint and `doctor.json` are written.
    """
    action = training.config.guard.action
    if action == "off":
        return
    sentence = _sentence(alarm, progress)
    report.warn(sentence)
    if action == "warn":
        return
    _write(alarm, training)
    saver.save(snapshot(training, progress), training.is_kept)
    saver.finish()
    raise HaltError(
        f"{sentence}; halted as guard.action=halt says; doctor.json has causes and remedies"
    )


def _write(alarm: Alarm, training: Training) -> None:
    if training.world.is_main:
        content = {**alarm.diagnosis.to_json(), "since_step": alarm.began}
        path = Path(training.config.run.dir) / "doctor.json"
        replace_file(path, json.dumps(content, indent=1).encode())


def _sentence(alarm: Alarm, progress: Progress) -> str:
    diagnosis = alarm.diagnosis
    figures = ", ".join(f"{name} {value:.3g}" for name, value in diagnosis.evidence.items())
    return (
        f"step {progress.step}: the probes say {diagnosis.verdict} since step {alarm.began} "
        f"({figures}). {diagnosis.causes[0] if diagnosis.causes else ''}".rstrip()
    )
