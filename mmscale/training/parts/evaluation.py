"""Figures on the evaluation sets every so often, and which evaluation was the best."""

from collections.abc import Mapping
from typing import Any

from mmscale.checkpoint.state import Best, RunState
from mmscale.config.evaluation import MAIN
from mmscale.config.schema import CheckpointConfig
from mmscale.diagnostics.pairs import Pairs
from mmscale.engine.compiled import evaluating
from mmscale.errors import ConfigError, Stop
from mmscale.evaluation.sets import as_logged, evaluate_sets
from mmscale.parallel.peers import gather_objects
from mmscale.training.part import Part, StepResult
from mmscale.training.parts.momentum import Momentum
from mmscale.training.parts.retention import Retention
from mmscale.training.stage import Services, Stage


class Evaluation(Part):
    """Evaluates when it is due, and after a stop that left no time for it when the run goes on.

    Attributes:
        metrics: The newest evaluation's, by name.
        best: The best evaluation by `checkpoint.best`.
        is_fresh: `metrics` were measured after the newest batch.
        was_stopped: The run was told to stop while it evaluated.
    """

    name = "evaluation"
    lasts = "run"

    def __init__(
        self,
        stage: Stage,
        services: Services,
        momentum: Momentum | None,
        retention: Retention | None = None,
    ):
        """Take what is evaluated.

        Args:
            stage: The model and its evaluation sets.
            services: Takes the figures.
            momentum: Evaluated in the model's place, where `eval.weights` says so.
            retention: Compares with the run's start, which then is evaluated too.
        """
        self._retention = retention
        self._stage, self._services = stage, services
        self._momentum = momentum if stage.config.eval.weights == "ema" else None
        self._is_owed = False
        self.metrics: dict[str, float] = {}
        self.best = stage.start.state.best
        self.is_fresh = self.was_stopped = False

    def begin(self, state: RunState) -> None:
        wants_start = self._retention is not None and self._retention.wants_start
        self.is_fresh = self._is_owed or wants_start
        if self.is_fresh:
            self.evaluate(state)
            self._is_owed = False

    def waits(self, state: RunState) -> bool:
        return self._is_due(state.step + 1)

    def observe(self, result: StepResult, state: RunState) -> None:
        stage, is_due = self._stage, self._is_due(state.step)
        self.is_fresh = False
        if not is_due or state.step == stage.timetable.total_steps:
            # After the last batch the run's end evaluates.
            return
        # A stop leaves while there is time: the evaluation is made when the run goes on.
        self._is_owed = True
        if result.record.stop:
            return
        try:
            self.evaluate(state)
        except Stop:
            self.was_stopped = True
        else:
            self._is_owed, self.is_fresh = False, True

    def evaluate(self, state: RunState) -> Pairs | None:
        """Measure every set and report; returns the embeddings of `data.eval`'s pairs. Collective.

        Raises:
            ConfigError: `checkpoint.best` is not measured.
            Stop: A rank was told to end; all of them leave after the same batch.
        """
        stage, services = self._stage, self._services
        if not stage.sets:
            return None

        def heard(done: int, total: int) -> None:
            services.watchdog.alive(f"the evaluation after {done} of {total}")
            if any(gather_objects(stage.job.world, services.stop.wanted)):
                raise Stop

        engine = stage.learner.engine
        with evaluating(engine.module):
            found = evaluate_sets(
                stage.config,
                engine.call if self._momentum is None else self._momentum.call,
                engine.device,
                stage.sets,
                stage.learner.peers,
                heard,
            )
        figures = as_logged(found)
        if self._retention is not None:
            figures |= self._retention.figures_of(found)
        pairs = found[MAIN].pairs if MAIN in found else None
        services.report.evaluation({"step": state.step, **figures}, pairs)
        self.metrics, self.best = figures, _best(stage.config.checkpoint, self.best, figures, state)
        return pairs

    def _is_due(self, step: int) -> bool:
        return self._stage.timetable.is_due(self._stage.config.eval.every, step)

    def state(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "is_owed": self._is_owed}

    def load(self, state: Mapping[str, Any]) -> None:
        self.metrics, self._is_owed = dict(state["metrics"]), state["is_owed"]


def _best(
    settings: CheckpointConfig, before: Best | None, figures: Mapping[str, float], state: RunState
) -> Best | None:
    """The best evaluation, with the new one in view."""
    if settings.best is None:
        return None
    if settings.best not in figures:
        raise ConfigError(
            f"checkpoint.best={settings.best}: the evaluation measures {', '.join(figures)}; name "
            "one of these"
        )
    now = Best(settings.best, figures[settings.best], state.step)
    if before is None or before.metric != now.metric:
        return now
    better = now.value > before.value if settings.best_is == "max" else now.value < before.value
    return now if better else before
