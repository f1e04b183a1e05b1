"""Does a mask help: the same training with it and without it, over seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmscale.errors import ConfigError
from mmscale.parallel.signals import StopSignal
from mmscale.report.metrics import MEAN_RECALL
from mmscale.sweep.trial import claim, train_trial

# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom; 1.96 beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Proof:
    """Mean recall on `data.eval` at the end of each run, percent, seed by seed.

    Attributes:
        whole: Of runs on all pairs.
        masked: Of runs without those that the mask leaves out.
    """

    whole: tuple[float, ...]
    masked: tuple[float, ...]

    @property
    def gain(self) -> float:
        """What the mask adds, in points."""
        return statistics.fmean(self._gains)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the gain, from the differences of runs of one seed (Student's t)."""
        count = len(self._gains)
        quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
        half = quantile * statistics.stdev(self._gains) / math.sqrt(count)
        return self.gain - half, self.gain + half

    @property
    def _gains(self) -> list[float]:
        return [after - before for before, after in zip(self.whole, self.masked, strict=True)]


def prove(
    words: Sequence[str], mask: Path, folder: Path, seeds: int, tell: Callable[[str], None]
) -> Proof:
    """Train with a mask and without it; runs that are there already go on, or are read.

    Args:
        words: The configuration, which evaluates on `data.eval`.
        mask: Ids to leave out.
        folder: Where the runs lie.
        seeds: Pairs of runs, two at least.
        tell: Takes a line for each run.

    Raises:
        ConfigError: The configuration cannot be trained with.
        TrialError: A training failed.
    """
    stop, found = StopSignal(), dict[str, list[float]]()
    for seed in range(seeds):
        for name, more in (("whole", []), ("masked", [f"data.mask={mask}"])):
            place = folder / f"{name}-{seed}"
            held = claim(place)
            if held is None:
                raise ConfigError(f"{place}: another command trains there; wait, or name another")
            chosen = [*words, f"run.seed={seed}", *more]
            outcome = train_trial(chosen, place, held, MEAN_RECALL, lambda curve: True, stop)
            if outcome.why or not outcome.curve:
                raise ConfigError(f"{place}: {outcome.why or 'nothing was evaluated'}")
            found.setdefault(name, []).append(outcome.curve[-1])
            tell(f"{name}, seed {seed}: mean recall {outcome.curve[-1]:.2f}")
    return Proof(tuple(found["whole"]), tuple(found["masked"]))
