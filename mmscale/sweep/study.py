"""The trials of a sweep in their journal, which several workers share: the one user of Optuna.

What a trial tries follows from the sweep's seed, the trial's number and the trials before it, so a
sweep that was killed goes on as it would have gone.
"""

import importlib.util
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.errors import ConfigError
from mmscale.sweep.space import Choice, Int, LogUniform, Parameter, Space
from mmscale.sweep.trial import Outcome, claim

JOURNAL = "journal.log"
NAME = "sweep"
_WHY, _NUMBER = "why", "number"  # user attributes of Optuna's trials


@dataclass(frozen=True)
class Trial:
    """A trial as tables and pictures need it.

    Attributes:
        number: From 0.
        state: `complete`, `pruned`, `failed` or `running`.
        value: The metric of its last evaluation.
        parameters: What it tried.
        curve: The metric of each evaluation.
        why: Why it failed.
    """

    number: int
    state: str
    value: float | None
    parameters: Mapping[str, Any]
    curve: tuple[float, ...]
    why: str | None


def trial_folder(out: Path, number: int) -> Path:
    """Where a trial's run lives."""
    return out / "trials" / f"{number:04d}"


def require_optuna() -> None:
    """Refuse to go on without it.

    Raises:
        ConfigError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "mmscale sweep needs optuna, which is not installed; run pip install 'mmscale[sweep]'"
        )


class Study:
    """A sweep's journal, opened by one worker."""

    def __init__(self, space: Space, out: Path):
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._out = optuna, space, out
        pruner: Any = optuna.pruners.NopPruner()
        if space.pruning is not None:
            pruner = optuna.pruners.MedianPruner(
                space.pruning.after_trials, space.pruning.after_evaluations
            )
        self._study = optuna.create_study(
            # A file and not SQLite: its lock holds on network file systems too.
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL))),
            study_name=NAME,
            direction=space.direction,
            pruner=pruner,
            load_if_exists=True,
        )

    def next(self) -> "Attempt | None":
        """A trial for this worker: one that a worker died with, else a new one; None at the end."""
        # Optuna's heartbeats would find dead workers too, but are experimental and need a database.
        lock = claim(self._out, wait=True)
        assert lock is not None
        try:
            left = self._abandoned()
            number = len(self._latest()) if left is None else left
            if number >= self._space.trials:
                return None
            seed = np.random.SeedSequence([self._space.seed, number]).generate_state(1)
            self._study.sampler = self._optuna.samplers.TPESampler(seed=int(seed[0]))
            trial = self._study.ask()
            folder = trial_folder(self._out, number)
            handle = claim(folder)
            assert handle is not None, f"{folder} was claimed without the lock of the sweep"
        finally:
            os.close(lock)
        values = {
            name: _suggest(trial, name, parameter)
            for name, parameter in self._space.parameters.items()
        }
        return Attempt(number, values, folder, handle, self._study, trial)

    def _abandoned(self) -> int | None:
        """Enqueue a trial that nobody works on any more; its number, None where there is none."""
        states = self._optuna.trial.TrialState
        # A worker that was killed between the queue and its trial left it there.
        if waiting := self._study.get_trials(deepcopy=False, states=(states.WAITING,)):
            return int(waiting[0].user_attrs[_NUMBER])
        for number, frozen in sorted(self._latest().items()):
            if frozen.state.is_finished() or number >= self._space.trials:
                continue
            handle = claim(trial_folder(self._out, number))
            if handle is not None:
                os.close(handle)
                self._study.enqueue_trial(frozen.params, user_attrs={_NUMBER: number})
                self._study.tell(frozen.number, state=states.FAIL)
                return number
        return None

    def _latest(self) -> dict[int, Any]:
        """The newest of Optuna's trials for each number of ours: a retried trial keeps its own."""
        latest: dict[int, Any] = {}
        new = itertools.count()
        for frozen in self._study.get_trials(deepcopy=False):
            again = frozen.user_attrs.get(_NUMBER)
            latest[next(new) if again is None else again] = frozen
        return latest

    def trials(self) -> list[Trial]:
        """All that was tried so far, oldest first."""
        states = {"FAIL": "failed", "WAITING": "running"}
        return [
            Trial(
                number=number,
                state=states.get(frozen.state.name, frozen.state.name.lower()),
                value=frozen.value,
                parameters=frozen.params,
                curve=tuple(value for _, value in sorted(frozen.intermediate_values.items())),
                why=frozen.user_attrs.get(_WHY),
            )
            for number, frozen in sorted(self._latest().items())
            if number < self._space.trials
        ]


class Attempt:
    """A trial in this worker's hands; `folder` is its run's and nobody else's."""

    def __init__(
        self,
        number: int,
        values: Mapping[str, Any],
        folder: Path,
        handle: int,
        study: Any,
        trial: Any,
    ):
        self.number, self.values, self.folder, self.handle = number, values, folder, handle
        self._study, self._trial = study, trial
        self._reported = 0
        self._ended_at: int | None = None

    def goes_on(self, curve: list[float]) -> bool:
        """Report evaluations; whether the trial is worth another.

        They are judged one by one: how far the training came meanwhile makes no difference.
        """
        while self._ended_at is None and self._reported < len(curve):
            self._trial.report(curve[self._reported], self._reported)
            if self._trial.should_prune():
                self._ended_at = self._reported
            self._reported += 1
        return self._ended_at is None

    def end(self, outcome: Outcome) -> None:
        """Write into the journal how it ended."""
        from optuna.trial import TrialState

        self.goes_on(outcome.curve)
        # Nothing is saved by stopping at the last evaluation.
        spared = self._ended_at in (None, len(outcome.curve) - 1)
        if outcome.why is not None:
            self._trial.set_user_attr(_WHY, outcome.why)
            self._study.tell(self._trial, state=TrialState.FAIL)
        elif outcome.finished and spared:
            self._study.tell(self._trial, outcome.curve[-1])
        else:
            self._study.tell(self._trial, state=TrialState.PRUNED)

    def close(self) -> None:
        """Give the folder back."""
        os.close(self.handle)


def _suggest(trial: Any, name: str, parameter: Parameter) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.texts)
    if isinstance(parameter, Int):
        return trial.suggest_int(name, parameter.low, parameter.high, step=parameter.step)
    log = isinstance(parameter, LogUniform)
    return trial.suggest_float(name, parameter.low, parameter.high, log=log)
