"""A diagnosis as a run can use it: not before its time, and without what is set already."""

from dataclasses import dataclass, replace

from mmscale.config.schema import Config
from mmscale.config.values import Duration
from mmscale.diagnostics.advice import not_yet_set
from mmscale.diagnostics.doctor import Diagnosis, diagnose
from mmscale.diagnostics.in_training import InTraining
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.rules_pairing import ORDER_EVIDENCE

# What towers and heads look like that were not trained yet.
UNTRAINED = (
    "complete_collapse",
    "dead_tower",
    "dimensional_collapse",
    "shuffled_pairs",
    "unaligned",
    "scale_stuck_low",
)
TOO_EARLY = "too_few_samples"
# A warm-up that goes on after as many updates is no excuse.
_LONGEST_BEGINNING = 1000
_LONG_ENOUGH = 5


@dataclass(frozen=True)
class Course:
    """How far a run has come.

    Attributes:
        config: What it is trained with.
        updates: Made so far.
        samples: Rows taken so far.
        epochs: Passes over the data, finished so far.
    """

    config: Config
    updates: int
    samples: int
    epochs: int

    def has_passed(self, duration: Duration) -> bool:
        """Whether it has come further than a duration from its beginning."""
        done = {"steps": self.updates, "samples": self.samples, "epochs": self.epochs}
        return done[duration.unit] >= duration.amount

    def beginning(self) -> str:
        """Why it is too early to say; empty where it is not."""
        if self.updates >= _LONGEST_BEGINNING:
            return ""
        warmup, grace = self.config.optim.warmup, self.config.guard.grace
        if not self.has_passed(warmup):
            return f"still in the warm-up of the learning rate (optim.warmup={warmup})"
        if not self.has_passed(grace):
            return f"fewer than a model is given to find its pairs (guard.grace={grace})"
        return ""


def diagnose_run(pairs: Pairs, course: Course, training: InTraining | None = None) -> Diagnosis:
    """The verdict on a run's held-out pairs.

    In a run that has only begun, what an untrained model looks like gets the verdict
    `too_few_samples`, with the number of updates in its evidence. What the space itself shows of
    mixed-up pairs and rows in another order needs no time.

    Args:
        pairs: Held-out pairs.
        course: Where the run is.
        training: What it knows of its training pairs.
    """
    diagnosis = diagnose(pairs, training)
    why = course.beginning()
    shown = any(name in diagnosis.evidence for name in ORDER_EVIDENCE)
    if why and diagnosis.verdict in UNTRAINED and not shown:
        return _too_early(diagnosis, course, why, training)
    remedies = not_yet_set(diagnosis.remedies, course.config, course.updates)
    return replace(diagnosis, remedies=remedies)


def _too_early(
    diagnosis: Diagnosis, course: Course, why: str, training: InTraining | None
) -> Diagnosis:
    updates = f"{course.updates:,} update{'s' * (course.updates != 1)}"
    causes = (
        f"Too early to say: {updates}, {why}; a model that is not trained yet looks like this",
        f"So far the figures are those of {diagnosis.verdict}; it counts if longer training "
        "leaves them so",
    )
    still = () if training is None else training.cause()
    needed = max(
        [
            int(duration.amount)
            for duration in (course.config.optim.warmup, course.config.guard.grace)
            if duration.unit == "steps"
        ],
        default=_LONGEST_BEGINNING,
    )
    return Diagnosis(
        TOO_EARLY,
        (),
        1.0,
        {"updates": float(course.updates), **diagnosis.evidence},
        (*causes, *still),
        not_yet_set(
            (f"train.duration={_LONG_ENOUGH * needed} steps",), course.config, course.updates
        ),
    )
