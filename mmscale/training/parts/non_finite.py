"""Batches that gave something not finite: skipped, then gone past from an earlier checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from mmscale.checkpoint.files import Checkpoint, newest_sound
from mmscale.checkpoint.state import RunState
from mmscale.errors import CheckpointError, HaltError
from mmscale.parallel.peers import gather_objects
from mmscale.training.part import Part, Rollback, StepResult
from mmscale.training.parts.evaluation import Evaluation
from mmscale.training.stage import Services, Stage


class NonFinite(Part):
    """Counts skipped updates in a row, and how often the weights went back; alike on every rank.

    One that only lowers fp16's loss scale does not count: a run finds its scale by several of them.
    """

    name = "non_finite"
    lasts = "run"

    def __init__(self, stage: Stage, services: Services, evaluation: Evaluation):
        self._stage, self._services, self._evaluation = stage, services, evaluation
        self._settings = stage.config.train.non_finite
        self._in_a_row = self._went_back = 0

    def observe(self, result: StepResult, state: RunState) -> Rollback | None:
        """Record a skipped update with its batch's keys. Collective then.

        Returns:
            The checkpoint before them, where more than `train.non_finite.skips` in a row were
            skipped: its weights, and the data after them.

        Raises:
            HaltError: It has gone back as often as it may, or there is no such checkpoint.
        """
        report = self._services.report
        if result.record.applied:
            self._in_a_row = 0
            return None
        scaler = self._stage.learner.engine.scaler()
        if lowers_the_scale(result.record.loss, scaler):
            sentence = f"the gradient overflowed fp16; the loss scale is now {scaler['scale']:g}"
            line = {"step": state.step, "incident": "skipped"}
            report.incident(line, f"step {state.step}: {sentence}")
            return None
        self._in_a_row += 1
        line = {"step": state.step, **self._found(result)}
        is_last = state.step == self._stage.timetable.total_steps
        if self._in_a_row <= self._settings.skips or is_last:
            report.incident({**line, "incident": "skipped"}, self._sentence(line))
            return None
        self._services.saver.settle()
        try:
            return self._roll_back(state, line)
        except HaltError as error:
            report.incident({**line, "incident": "halted"}, self._sentence(line))
            raise HaltError(f"{self._sentence(line)}; {error}") from error

    def state(self) -> dict[str, int]:
        return {"in_a_row": self._in_a_row, "went_back": self._went_back}

    def load(self, state: Mapping[str, int]) -> None:
        self._in_a_row, self._went_back = state["in_a_row"], state["went_back"]

    def _roll_back(self, state: RunState, line: dict[str, Any]) -> Rollback:
        times, most = self._went_back + 1, self._settings.rollbacks
        if times > most:
            raise HaltError(
                f"train.non_finite.rollbacks={most} bears no further one; lower optim.lr, set "
                "engine.precision=fp32, or look at these samples"
            )
        checkpoint = self._before(state, state.step - self._in_a_row + 1)
        step = checkpoint.state.step
        self._services.report.incident(
            {**line, "incident": "went_back", "weights_of_step": step},
            f"{self._sentence(line)}; the weights go back to those of step {step}, the data goes "
            f"on: {times} of the {most} times that train.non_finite.rollbacks bears",
        )
        self._in_a_row, self._went_back = 0, times
        return Rollback(checkpoint)

    def _before(self, state: RunState, first: int) -> Checkpoint:
        """The newest checkpoint of this stage from before the step `first` that was due.

        Not what a stop left between those that were: without the stop it was not there.
        """
        job, timetable = self._stage.job, self._stage.timetable
        every, best = self._stage.config.checkpoint.every, self._evaluation.best

        def is_wanted(step: int) -> bool:
            is_best = best is not None and step == best.step
            return step < first and (is_best or timetable.is_due(every, step))

        try:
            good = newest_sound(job.folder, job.world, self._services.report.warn, is_wanted)
        except CheckpointError as error:
            raise HaltError(str(error)) from error
        if good is None or good.state.stage != state.stage:
            raise HaltError(
                f"no checkpoint of this stage before step {first} to go back to; lower optim.lr, "
                "set engine.precision=fp32 or checkpoint.every to less"
            )
        return good

    def _found(self, result: StepResult) -> dict[str, Any]:
        """Keys of the global batch, and those whose embeddings are not finite, if not all."""
        image, text = result.rows.image.unit, result.rows.text.unit
        finite = image.isfinite().all(1) & text.isfinite().all(1)
        everyone = gather_objects(self._stage.job.world, (result.batch.keys, finite.tolist()))
        keys = [key for some, _ in everyone for key in some]
        fine = [is_fine for _, some in everyone for is_fine in some]
        suspects = [key for key, is_fine in zip(keys, fine, strict=True) if not is_fine]
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
