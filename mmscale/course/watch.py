"""What an evaluation decides: the rate falls, the stage is over, or the run is."""

import math
from dataclasses import replace

from mmscale.assembly import Training
from mmscale.checkpoint.state import Progress
from mmscale.config.staging import expanded
from mmscale.errors import ConfigError
from mmscale.report.report import Report


def watched(training: Training, report: Report, progress: Progress) -> Progress:
    """Take the newest evaluation; the same on every rank.

    `best` is the best value of `stop.metric` in this stage, `stale` counts the evaluations since,
    `falls` how often the rate fell.

    Raises:
        ConfigError: No evaluation has `stop.metric`.
    """
    stop, optim = training.config.stop, training.config.optim
    stages = expanded(training.run)
    patience = stages[progress.stage].patience if stages else None
    plateau = optim.plateau.patience if optim.schedule == "plateau" else None
    if not progress.metrics or not (stop.patience or patience or plateau):
        return progress
    if stop.metric not in progress.metrics:
        raise ConfigError(
            f"stop.metric={stop.metric} is not measured; evaluations have "
            f"{', '.join(progress.metrics)}"
        )
    value, before = progress.metrics[stop.metric], progress.watched
    best = max(value, before.get("best", value))
    stale = 0 if value > before.get("best", -math.inf) else before["stale"] + 1
    falls = before.get("falls", 0)
    over = ""
    if plateau and stale and stale % plateau == 0:
        falls += 1
        report.say(f"plateau: {stop.metric} is {value:.2f}, its best {best:.2f}; the rate falls")
    if patience and stale >= patience:
        over = "stage"
    elif stop.patience and stale >= stop.patience:
        over = "run"
    if over:
        report.say(
            f"the {over} ends at step {progress.step}: no {stop.metric} above {best:.2f} in "
            f"{stale:.0f} evaluations"
        )
    state = {**before, "best": best, "stale": stale, "falls": falls}
    return replace(progress, over=over, watched=state)


def plateau_factor(training: Training, progress: Progress) -> float:
    """What the falls so far have made of the rate."""
    return float(training.config.optim.plateau.factor ** progress.watched.get("falls", 0))
