"""What a run does about a verdict that has lasted: say so, end, or go back and go on differently.

Every rank calls these alike; what they decide from is the same on all of them.
"""

import json
from dataclasses import replace
from pathlib import Path

from mmscale.assembly import Segment, Training, snapshot
from mmscale.checkpoint.files import Checkpoint, Progress, newest_sound
from mmscale.checkpoint.saver import Saver
from mmscale.config.load import with_words
from mmscale.course.remedies import words_against
from mmscale.diagnostics.persistence import Alarm
from mmscale.durable import replace_file
from mmscale.errors import HaltError
from mmscale.report.report import Report


def respond(
    alarm: Alarm, training: Training, report: Report, saver: Saver, progress: Progress
) -> Segment | None:
    """Do what `guard.action` says; the segment that the run goes on as, None to go on as it is.

    Args:
        alarm: The verdict.
        training: The segment.
        report: The run's voice.
        saver: Writes checkpoints.
        progress: Where the run is.

    Raises:
        HaltError: The run is to end, or its remedy has been used or does not exist.
    """
    action, verdict = training.config.guard.action, alarm.diagnosis.verdict
    if action == "off":
        return None
    report.warn(_sentence(alarm, progress))
    if action == "warn":
        return None
    words = words_against(verdict, training.run)
    saver.settle()
    if action == "remedy" and words and not progress.remedies:
        run_dir = Path(training.config.run.dir)
        origin = newest_sound(run_dir, training.world, report.warn, before=alarm.began)
        if origin is not None:
            return _remedied(words, alarm, training, report, origin)
    _write(alarm, training, progress.remedies)
    saver.save(snapshot(training, progress))
    saver.finish()
    raise HaltError(f"{_sentence(alarm, progress)}; {_why_halted(action, words, progress)}")


def keep_a_way_back(training: Training, saver: Saver) -> None:
    """With `guard.action=remedy` there is a checkpoint to go back to from the first step on."""
    if training.config.guard.action == "remedy" and training.start.step == 0:
        saver.save(snapshot(training, training.start))


def _remedied(
    words: tuple[str, ...], alarm: Alarm, training: Training, report: Report, origin: Checkpoint
) -> Segment:
    """The same run from before the trouble began, with other settings."""
    start = replace(origin.progress, remedies=words)
    report.go_back(start.step)
    report.probe({"step": start.step, "verdict": alarm.diagnosis.verdict, "remedies": list(words)})
    report.warn(f"going back to step {start.step} with {' '.join(words)}")
    _write(alarm, training, words)
    return Segment(with_words(training.run, words), origin, start)


def _write(alarm: Alarm, training: Training, words: tuple[str, ...]) -> None:
    if training.world.is_main:
        content = {**alarm.diagnosis.to_json(), "since_step": alarm.began, "applied": list(words)}
        path = Path(training.config.run.dir) / "doctor.json"
        replace_file(path, json.dumps(content, indent=1).encode())


def _sentence(alarm: Alarm, progress: Progress) -> str:
    diagnosis = alarm.diagnosis
    figures = ", ".join(f"{name} {value:.3g}" for name, value in diagnosis.evidence.items())
    return (
        f"step {progress.step}: the probes say {diagnosis.verdict} since step {alarm.began} "
        f"({figures}). {diagnosis.causes[0] if diagnosis.causes else ''}".rstrip()
    )


def _why_halted(action: str, words: tuple[str, ...], progress: Progress) -> str:
    if action == "halt":
        return "halted as guard.action=halt says; doctor.json has causes and remedies"
    if progress.remedies:
        return f"its remedy ({' '.join(progress.remedies)}) has been tried; see doctor.json"
    if words:
        return "no checkpoint from before it is left to go back to; see doctor.json"
    return "no setting mends it; doctor.json says what to check"
