"""Checkpoints of a run in training: when due, at a new best, and when it is told to stop."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from mmscale.checkpoint.state import RunState
from mmscale.checkpoint.write import take_snapshot
from mmscale.errors import TerminatedError
from mmscale.parallel.device import rng_state
from mmscale.training.part import Part, StepResult
from mmscale.training.parts.evaluation import Evaluation
from mmscale.training.stage import Services, Stage


class Checkpoints(Part):
    """Comes last, so that what it saves holds what the parts before it have made of the batch."""

    name = "checkpoints"

    def __init__(
        self, stage: Stage, services: Services, parts: Sequence[Part], evaluation: Evaluation
    ):
        """Take what is saved.

        Args:
            stage: Engine and data.
            services: The saver.
            parts: Whose states are saved.
            evaluation: Says which checkpoint is the best.
        """
        self._stage, self._saver, self._parts = stage, services.saver, parts
        self._evaluation = evaluation

    def begin(self, state: RunState) -> None:
        if state.step == 0 and self._stage.config.retain.sets:
            self.save(state)
        elif self._evaluation.is_fresh:
            self._save_if_due(state)

    def waits(self, state: RunState) -> bool:
        return self._is_due(state.step + 1)

    def observe(self, result: StepResult, state: RunState) -> None:
        """Raises TerminatedError where the run was told to stop; the checkpoint is written."""
        if result.record.written:
            self._saver.settle()
        # The record after one that was overtaken says so too: a rank's wish to stop stays.
        if state.step == self._stage.timetable.total_steps or result.overtaken:
            return
        if result.record.stop or self._evaluation.was_stopped:
            self.save(state)
            self._saver.finish()
            raise TerminatedError(f"told to stop; step {state.step} is in a checkpoint")
        self._save_if_due(state)

    def save(self, state: RunState) -> None:
        """Start to write a checkpoint. Collective."""
        stage, engine = self._stage, self._stage.learner.engine
        snapshot = take_snapshot(
            replace(state, best=self._evaluation.best, scaler=engine.scaler()),
            {part.name: part.state() for part in self._parts},
            stage.job.kept,
            chain(
                engine.tensors(),
                chain.from_iterable(part.tensors() for part in self._parts),
                stage.stream.schedule.tensors(),
            ),
            rng_state(engine.device),
            stage.job.world,
        )
        every = stage.config.checkpoint.every
        self._saver.save(snapshot, partial(stage.timetable.is_kept, every))

    def _save_if_due(self, state: RunState) -> None:
        best = self._evaluation.best
        is_best = best is not None and best.step == state.step
        if is_best or self._is_due(state.step):
            self.save(state)

    def _is_due(self, step: int) -> bool:
        return self._stage.timetable.is_due(self._stage.config.checkpoint.every, step)
