"""What an evaluation decides: the rate falls, the stage is over, or the run is."""

import math
from collections.abc import Mapping

from mmscale.checkpoint.state import RunState
from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.report.report import Report
from mmscale.training.part import Part, StageOver, StepResult
from mmscale.training.parts.evaluation import Evaluation


class Stopping(Part):
    """Early stopping, a stage's patience and plateaus; the same on every rank.

    It remembers `best`, the best value of `stop.metric` in this stage, `stale`, the evaluations
    since, and `falls`, how often the rate fell.
    """

    name = "stopping"

    def __init__(
        self, config: Config, stage_patience: int | None, evaluation: Evaluation, report: Report
    ):
        """Take what is waited for.

        Args:
            config: The stage's.
            stage_patience: Evaluations without a new best that end the stage.
            evaluation: Measures.
            report: The run's voice.
        """
        self._config, self._stage_patience = config, stage_patience
        self._evaluation, self._report = evaluation, report
        self._state: dict[str, float] = {}

    def rate(self) -> float:
        """What the falls so far have made of it."""
        return float(self._config.optim.plateau.factor ** self._state.get("falls", 0))

    def begin(self, state: RunState) -> StageOver | None:
        """Takes the evaluation that a stop left for now; raises as `observe` does."""
        return self._look(state)

    def observe(self, result: StepResult, state: RunState) -> StageOver | None:
        """Raises ConfigError where no evaluation has `stop.metric`."""
        return self._look(state)

    def _look(self, state: RunState) -> StageOver | None:
        """Take the newest evaluation, where it is of this moment."""
        if not self._evaluation.is_fresh:
            return None
        stop, optim = self._config.stop, self._config.optim
        patience, metrics = self._stage_patience, self._evaluation.metrics
        plateau = optim.plateau.patience if optim.schedule == "plateau" else None
        if not metrics or not (stop.patience or patience or plateau):
            return None
        if stop.metric not in metrics:
            raise ConfigError(
                f"stop.metric={stop.metric} is not measured; evaluations have {', '.join(metrics)}"
            )
        best, stale = self._count(metrics[stop.metric], plateau)
        over = None
        if patience and stale >= patience:
            over = StageOver("stage")
        elif stop.patience and stale >= stop.patience:
            over = StageOver("run")
        if over:
            self._report.say(
                f"the {over.what} ends at step {state.step}: no {stop.metric} above {best:.2f} in "
                f"{stale:.0f} evaluations"
            )
        return over

    def state(self) -> dict[str, float]:
        return dict(self._state)

    def load(self, state: Mapping[str, float]) -> None:
        self._state = dict(state)

    def _count(self, value: float, plateau: int | None) -> tuple[float, float]:
        before = self._state
        best = max(value, before.get("best", value))
        stale = 0 if value > before.get("best", -math.inf) else before["stale"] + 1
        falls = before.get("falls", 0)
        if plateau and stale and stale % plateau == 0:
            falls += 1
            metric = self._config.stop.metric
            self._report.say(
                f"plateau: {metric} is {value:.2f}, its best {best:.2f}; the rate falls"
            )
        self._state = {"best": best, "stale": stale, "falls": falls}
        return best, stale
