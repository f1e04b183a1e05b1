"""How a run began, and what it has kept of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint.files import Checkpoint, step_folder
from mmscale.checkpoint.state import STATE, RunState
from mmscale.contracts import NamedTensor
from mmscale.errors import CheckpointError
from mmscale.evaluation.retention import AtStart, retained
from mmscale.evaluation.sets import Evaluated
from mmscale.training.part import Part
from mmscale.training.stage import Stage


class Retention(Part):
    """Compares every evaluation with the one before the first update.

    What the model made of the retained sets then is in the run's first checkpoint, which is kept.
    """

    name = "retention"
    lasts = "run"

    def __init__(self, stage: Stage):
        """Take what is retained, and where the run's first checkpoint lies."""
        self._settings, self._device = stage.config.retain, stage.learner.engine.device
        self._folders = [step_folder(stage.job.folder, 0)]
        if (source := stage.start.checkpoint) is not None:
            # A run that goes on from another folder's checkpoint.
            self._folders.append(source.folder.parent / self._folders[0].name)
        self._start: AtStart | None = None

    @property
    def wants_start(self) -> bool:
        """The run has not been evaluated before its first update."""
        return self._start is None

    def begin(self, state: RunState) -> None:
        if state.step:
            self._start = self._read()

    def figures_of(self, evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
        """What an evaluation shows beside the start, as it is logged; the first is the start."""
        if self._start is None:
            self._start = AtStart.of(evaluated, self._settings)
        return retained(evaluated, self._start, self._settings)

    def state(self) -> dict[str, Any]:
        return {} if self._start is None else {"figures": dict(self._start.figures)}

    def tensors(self) -> Iterator[NamedTensor]:
        rows = {} if self._start is None else self._start.rows
        for name, value in rows.items():
            yield NamedTensor(f"{self.name}.{name}", value.to(self._device), {})

    def _read(self) -> AtStart:
        folder = next((path for path in self._folders if (path / STATE).exists()), None)
        if folder is None:
            raise CheckpointError(
                f"{self._folders[0]}: missing, and with it what retain.sets compares with; put it "
                "back, or set retain.sets=[]"
            )
        return start_in(folder)


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
