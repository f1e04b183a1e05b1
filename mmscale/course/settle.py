"""What is settled after each update: what is logged, whether the run goes on, and what is kept."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from mmscale.assembly import Segment, Training, snapshot
from mmscale.checkpoint.state import Progress
from mmscale.contracts import Batch
from mmscale.course.closing import evaluated
from mmscale.course.damage import check_damage
from mmscale.course.divergence import guarded
from mmscale.course.guard import respond
from mmscale.course.probes import Probes
from mmscale.course.run import Run
from mmscale.course.skips import Skips
from mmscale.course.watch import watched
from mmscale.engine.step import Update
from mmscale.errors import CheckpointError, Stop, TerminatedError


class Settling:
    """Settles a segment's updates, one after another. Ranks call it alike, and decide alike.

    Args:
        training: The segment.
        run: What lasts over all of them.
        warmup: Updates of the segment that its loss is not judged by.
    """

    def __init__(self, training: Training, run: Run, warmup: int):
        self._training, self._run, self._warmup = training, run, warmup
        self._skips = Skips(training, run)
        self._probes = Probes(training, run.report)
        self._parts: dict[str, Skips | Probes] = {"skips": self._skips, "probes": self._probes}
        for name, state in training.start.parts.items():
            self._load(name, state)

    def _load(self, name: str, state: Mapping[str, Any]) -> None:
        try:
            self._parts[name].load(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"run.resume: the checkpoint's {name} are not what this mmscale remembers "
                f"({type(error).__name__}: {error}); start another run.dir"
            ) from error

    def _remembering(self, progress: Progress) -> Progress:
        return replace(progress, parts={name: part.state() for name, part in self._parts.items()})

    def begin(self) -> Progress:
        """Where the segment starts, with the evaluation that a stop before it left out."""
        start = self._training.start
        return self._kept(replace(start, owes_evaluation=False)) if start.owes_evaluation else start

    def before(self, progress: Progress) -> bool:
        """Look at what the coming update is going to change; returns whether it is probed."""
        return self._probes.before(progress)

    def after(
        self, progress: Progress, done: Update, batch: Batch
    ) -> tuple[Progress, Segment | None]:
        """Take an update; `progress.over` says whether an evaluation has ended the segment.

        Args:
            progress: With the update.
            done: What it gave.
            batch: Its rows.

        Returns:
            The progress, and what the run goes on as, where that is another segment.

        Raises:
            TerminatedError: The run was told to stop; the checkpoint is written.
            HaltError: The figures say that it is to end.
            DataError: Too many rows could not be decoded.
        """
        training, run, record = self._training, self._run, done.record
        if (following := self._skips.count(progress, done, batch)) is not None:
            assert following.start is not None, "it says where the data goes on"
            return progress, replace(following, start=self._remembering(following.start))
        progress = guarded(training.config.stop, self._warmup, progress, record)
        if record.damaged:
            check_damage(training, run.report, batch, progress)
        if record.written:
            run.saver.settle()
        alarm = self._probes.after(progress, done, batch)
        progress = self._remembering(progress)
        if alarm is not None:
            respond(alarm, training, run.report, run.saver, progress)
        if progress.step == training.total_steps:
            return progress, None
        if record.stop:
            self._stop(progress)
        try:
            return self._kept(progress), None
        except Stop:
            self._stop(progress)

    def _stop(self, progress: Progress) -> NoReturn:
        """Leave while there is time: a due evaluation is made when the run goes on."""
        owes = self._training.due(self._training.config.eval.every, progress.step)
        self._run.saver.save(
            snapshot(self._training, replace(progress, owes_evaluation=owes)),
            self._training.is_kept,
        )
        self._run.saver.finish()
        raise TerminatedError(f"told to stop; step {progress.step} is in a checkpoint")

    def _kept(self, progress: Progress) -> Progress:
        """Evaluate and write a checkpoint where they are due; returns what the evaluation says."""
        training, run, step = self._training, self._run, progress.step
        if training.due(training.config.eval.every, step):
            progress, _ = evaluated(training, run, progress)
            progress = watched(training, run.report, progress)
        is_best = progress.best is not None and progress.best.step == step
        if is_best or training.due(training.config.checkpoint.every, step):
            run.saver.save(snapshot(training, progress), training.is_kept)
        return progress
