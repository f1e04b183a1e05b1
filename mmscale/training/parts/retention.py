"""How a run began, and what it has kept of it."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint.files import Checkpoint, step_folder
from mmscale.checkpoint.state import STATE, RunState
from mmscale.contracts import NamedTensor
from mmscale.diagnostics.forgetting import VERDICT, Forgetting
from mmscale.errors import CheckpointError
from mmscale.evaluation.retention import AtStart, retained
from mmscale.evaluation.sets import Evaluated, as_logged
from mmscale.outputs import publish, writing
from mmscale.parallel.peers import barrier
from mmscale.report.report import Report
from mmscale.training.part import Halt, Part, StepResult
from mmscale.training.stage import Stage


class Retention(Part):
    """Compares every evaluation with the one before the first update.

    What the model made of the retained sets then is in the run's first checkpoint, which is kept.
    """

    name = "retention"
    lasts = "run"

    def __init__(self, stage: Stage, report: Report):
        """Take what is retained, where the run's first checkpoint lies, and the run's voice."""
        self._settings, self._guard = stage.config.retain, stage.config.guard
        self._device, self._report = stage.learner.engine.device, report
        self._first, self._world = step_folder(stage.job.folder, 0), stage.job.world
        self._origin = stage.start.checkpoint
        self._start: AtStart | None = None
        # Evaluations in a row that found too much lost, and whether that was told.
        self._in_a_row, self._is_told = 0, False

    @property
    def wants_start(self) -> bool:
        """The run has not been evaluated before its first update."""
        return self._start is None

    def begin(self, state: RunState) -> None:
        if state.step:
            self._bring_first()
            self._start = start_in(self._first)

    def figures_of(self, evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
        """What an evaluation shows beside the start, as it is logged; the first is the start."""
        if self._start is None:
            self._start = AtStart.of(evaluated, self._settings)
        figures = retained(evaluated, self._start, self._settings)
        found = Forgetting.of({**as_logged(evaluated), **figures}, self._settings)
        self._in_a_row = self._in_a_row + 1 if found and found.lost > found.allowed else 0
        self._is_told = self._is_told and self._in_a_row > 0
        return figures

    def observe(self, result: StepResult, state: RunState) -> Halt | None:
        """As `guard` says where too much stays lost, evaluation after evaluation."""
        guard, row = self._guard, self._in_a_row
        if self._is_told or guard.action == "off" or VERDICT not in guard.verdicts:
            return None
        if row < guard.patience:
            return None
        self._is_told = True
        sentence = (
            f"step {state.step}: {VERDICT} in {row} evaluations in a row: a set of retain.sets is "
            "farther below the run's start than it may be (`retain/lost` in metrics.jsonl)"
        )
        self._report.warn(sentence)
        if guard.action == "warn":
            return None
        return Halt(f"{sentence}; halted as guard.action=halt says; lower optim.lr, or train less")

    def state(self) -> dict[str, Any]:
        if self._start is None:
            return {}
        told = {"in_a_row": self._in_a_row, "is_told": self._is_told}
        return {"figures": dict(self._start.figures), **told}

    def load(self, state: Mapping[str, Any]) -> None:
        if state:
            self._in_a_row, self._is_told = state["in_a_row"], state["is_told"]

    def tensors(self) -> Iterator[NamedTensor]:
        rows = {} if self._start is None else self._start.rows
        for name, value in rows.items():
            yield NamedTensor(f"{self.name}.{name}", value.to(self._device), {})

    def _bring_first(self) -> None:
        """Take the first checkpoint along where the run goes on in another folder. Collective."""
        first, origin = self._first, self._origin
        if self._world.is_main and origin is not None and not first.exists():
            source, aside = origin.folder.parent / first.name, first.with_name(f".{first.name}")
            if source.exists():
                shutil.rmtree(aside, ignore_errors=True)
                with writing("run.dir", first):
                    shutil.copytree(source, aside)
                    publish(aside, first)
        barrier()
        if not (first / STATE).exists():
            raise CheckpointError(
                f"{first}: missing, and with it what retain.sets compares with; put it back, or "
                "set retain.sets=[]"
            )


def start_in(folder: Path) -> AtStart:
    """How a run began, from its first checkpoint.

    Raises:
        CheckpointError: It was written without `retain.sets`, or is damaged.
    """
    first = Checkpoint(folder)
    part = first.parts.get(Retention.name, {})
    if "figures" not in part:
        raise CheckpointError(
            f"{folder}: holds no evaluation of the run's start, which retain.sets compares with; "
            "set retain.sets=[], or start another run.dir"
        )
    prefix = f"{Retention.name}."
    names = [name for name in first.tensors if name.startswith(prefix)]
    rows = {name.removeprefix(prefix): first.read("value", name) for name in names}
    return AtStart(part["figures"], {name: value.to(torch.float32) for name, value in rows.items()})
