"""The trials of a sweep in their journal, which several workers share: the one user of Optuna.

What a trial tries follows from the sweep's seed, the trial's number and the trials before it, so a
sweep that was killed goes on as it would have gone.
"""

import importlib.util
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
_WHY = "why"


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
        states = self._optuna.trial.TrialState
        while True:
            for frozen in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
                if frozen.number < self._space.trials and (found := self._take(frozen)):
                    return found
            if len(self._study.get_trials(deepcopy=False)) >= self._space.trials:
                return None
            trial = self._study.ask()
            if trial.number >= self._space.trials:
                # Another worker was faster; only the first `trials` count.
                self._study.tell(trial, state=states.FAIL)
                return None
            # Whoever claims it first has it, as with those that were left behind.

    def _take(self, frozen: Any) -> "Attempt | None":
        handle = claim(trial_folder(self._out, frozen.number))
        if handle is None:
            return None
        # Perhaps it ended between the look at the journal and the claim.
        trials = self._study.get_trials(deepcopy=False)
        if trials[frozen.number].state.is_finished():
            os.close(handle)
            return None
        # Optuna gives the values that a trial was given before, and draws those that are missing.
        trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
        seed = np.random.SeedSequence([self._space.seed, frozen.number]).generate_state(1)
        self._study.sampler = self._optuna.samplers.TPESampler(seed=int(seed[0]))
        values = {
            name: _suggest(trial, name, parameter)
            for name, parameter in self._space.parameters.items()
        }
        return Attempt(self._study, trial, values, trial_folder(self._out, frozen.number), handle)

    def trials(self) -> list[Trial]:
        """All that was tried so far, oldest first."""
        found = self._study.get_trials(deepcopy=False)[: self._space.trials]
        return [
            Trial(
                number=frozen.number,
                state={"FAIL": "failed"}.get(frozen.state.name, frozen.state.name.lower()),
                value=frozen.value,
                parameters=frozen.params,
                curve=tuple(value for _, value in sorted(frozen.intermediate_values.items())),
                why=frozen.user_attrs.get(_WHY),
            )
            for frozen in found
        ]


class Attempt:
    """A trial in this worker's hands; `folder` is its run's and nobody else's."""

    def __init__(
        self, study: Any, trial: Any, values: Mapping[str, Any], folder: Path, handle: int
    ):
        self.number: int = trial.number
        self.values, self.folder, self.handle = values, folder, handle
        self._study, self._trial = study, trial
        self._reported = len(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self._ended_at: int | None = None
        if self._reported and trial.should_prune():
            self._ended_at = self._reported - 1

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
