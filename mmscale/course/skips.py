"""Batches that gave something not finite: skipped, then gone past from an earlier checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmscale.assembly import Segment, Training
from mmscale.checkpoint.files import newest_sound
from mmscale.checkpoint.state import Progress
from mmscale.contracts import Batch
from mmscale.course.run import Run
from mmscale.dist.peers import from_all
from mmscale.engine.step import Update
from mmscale.errors import CheckpointError, HaltError


class Skips:
    """Counts skipped updates in a row; the same on every rank.

    One that only lowers fp16's loss scale does not count: a run finds its scale by several of them.
    """

    def __init__(self, training: Training, run: Run):
        self._training, self._run = training, run
        self._settings = training.config.train.non_finite
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {"in_a_row": self._in_a_row}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._in_a_row = int(state["in_a_row"])

    def count(self, progress: Progress, done: Update, batch: Batch) -> Segment | None:
        """Take an update; one that was skipped is recorded with its batch's keys. Collective then.

        Returns:
            What the run goes on as, where more than `train.non_finite.skips` in a row were skipped:
            the weights of the last checkpoint before them, the data after them.

        Raises:
            HaltError: It has gone back as often as it may, or there is no such checkpoint.
        """
        if done.record.applied:
            self._in_a_row = 0
            return None
        scaler = self._training.engine.scaler()
        if lowers_the_scale(done.record.loss, scaler):
            sentence = f"the gradient overflowed fp16; the loss scale is now {scaler['scale']:g}"
            line = {"step": progress.step, "incident": "skipped"}
            self._run.report.incident(line, f"step {progress.step}: {sentence}")
            return None
        self._in_a_row += 1
        line = {"step": progress.step, **self._found(done, batch)}
        is_last = progress.step == self._training.total_steps
        if self._in_a_row <= self._settings.skips or is_last:
            self._run.report.incident({**line, "incident": "skipped"}, self._sentence(line))
            return None
        self._run.saver.settle()
        try:
            return self._back(progress, line)
        except HaltError as error:
            self._run.report.incident({**line, "incident": "halted"}, self._sentence(line))
            raise HaltError(f"{self._sentence(line)}; {error}") from error

    def _back(self, progress: Progress, line: dict[str, Any]) -> Segment:
        times, most = progress.went_back + 1, self._settings.rollbacks
        if times > most:
            raise HaltError(
                f"train.non_finite.rollbacks={most} bears no further one; lower optim.lr, set "
                "engine.precision=fp32, or look at these samples"
            )
        training, first = self._training, progress.step - self._in_a_row + 1
        every, best = training.config.checkpoint.every, progress.best and progress.best.step
        try:
            # Not what a stop left between those that were due: without the stop it was not there.
            good = newest_sound(
                Path(training.config.run.dir),
                training.world,
                self._run.report.warn,
                lambda step: step < first and (step == best or training.due(every, step)),
            )
        except CheckpointError as error:
            raise HaltError(str(error)) from error
        if good is None or good.progress.stage != progress.stage:
            raise HaltError(
                f"no checkpoint of this stage before step {first} to go back to; lower optim.lr, "
                "set engine.precision=fp32 or checkpoint.every to less"
            )
        weights = good.progress
        self._run.report.incident(
            {**line, "incident": "went_back", "weights_of_step": weights.step},
            f"{self._sentence(line)}; the weights go back to those of step {weights.step}, the "
            f"data goes on: {times} of the {most} times that train.non_finite.rollbacks bears",
        )
        self._in_a_row = 0
        start = replace(
            progress,
            updates=weights.updates,
            stage_updates=weights.stage_updates,
            went_back=times,
        )
        return Segment(self._training.run, good, start, self._training.kept)

    def _found(self, done: Update, batch: Batch) -> dict[str, Any]:
        """Keys of the global batch, and those whose embeddings are not finite, if not all."""
        sound = done.image.unit.isfinite().all(1) & done.text.unit.isfinite().all(1)
        parts = from_all(self._training.world, (batch.keys, sound.tolist()))
        keys = [key for part, _ in parts for key in part]
        fine = [is_sound for _, part in parts for is_sound in part]
        suspects = [key for key, is_sound in zip(keys, fine, strict=True) if not is_sound]
        return {"keys": keys, "suspects": suspects if len(suspects) < len(keys) else []}

    def _sentence(self, line: dict[str, Any]) -> str:
        named = line["suspects"] or line["keys"]
        rest = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return (
            f"step {line['step']}: loss or gradient not finite, {self._in_a_row} in a row, on "
            f"{', '.join(named[:3])}{rest}"
        )


def lowers_the_scale(loss: float, scaler: Mapping[str, float]) -> bool:
    """Whether an update was skipped for a gradient that a smaller loss scale may bear.

    Args:
        loss: Of the update.
        scaler: `Engine.scaler` after it.
    """
    return math.isfinite(loss) and scaler.get("scale", 0.0) >= 1
