"""A diagnosis as a run can use it: not before its time, with remedies that are not set already."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmscale.config.load import with_words
from mmscale.config.schema import Config
from mmscale.config.values import Duration
from mmscale.diagnostics.doctor import Diagnosis, InTraining, diagnose
from mmscale.diagnostics.forgetting import Forgetting
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.rules_pairing import ORDER_EVIDENCE
from mmscale.errors import ConfigError

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
        forgetting: What it has lost since its start, where it looks at that.
    """

    config: Config
    updates: int
    samples: int
    epochs: int
    forgetting: Forgetting | None = None

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
    diagnosis = diagnose(pairs, training, course.forgetting)
    why = course.beginning()
    shown = any(name in diagnosis.evidence for name in ORDER_EVIDENCE)
    if why and diagnosis.verdict in UNTRAINED and not shown:
        return _too_early(diagnosis, course, why, training)
    remedies = not_yet_set(diagnosis.remedies, course.config, course.updates)
    return replace(diagnosis, remedies=remedies)


def diagnose_alone(pairs: Pairs) -> Diagnosis:
    """The verdict on anybody's pairs: what helps is said in words, as settings are not ours."""
    diagnosis = diagnose(pairs)
    return replace(diagnosis, remedies=in_words(diagnosis.remedies))


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
        diagnosis.pairs,
        f"{needed:,} updates, or {diagnosis.would_change}",
    )


# What goes further than the remedy does is no less of one.
_MORE = (
    "train.global_batch_size",
    "negatives.queue.size",
    "model.embed_dim",
    "model.head.standardize",
)
_BOUND = "model.logit_scale.max"
_LESS = ("optim.lr", "optim.clip_norm", _BOUND, "optim.weight_decay_scale.scale")
_WARMUP = "optim.warmup"

_IN_WORDS = {
    "data.augment=crop": "Augment the training images, by random crops",
    "data.captions=random": "Draw one of an image's captions at random, another one each epoch",
    "data.feature_cache=null": "Compute the towers' features anew instead of reading stored ones",
    "data.match=caption": "Count rows with equal captions as positives",
    "data.workers=0": "Load the data in one process, to see whether the order stays wrong",
    "engine.precision=fp32": "Compute in fp32",
    "loss.preset=clip": "Use InfoNCE over the batch, with positives by image id",
    "loss.preset=vicreg_clip": "Add a term that keeps variance and decorrelates (VICReg)",
    "model.embed_dim=512": "Make the shared space wider",
    "model.head.kind=linear": "Use one linear layer as head",
    "model.head.standardize=4096": "Standardise the towers' features before the heads",
    "model.logit_scale.init=14.2857": "Start the logit scale at 1 / 0.07 = 14.3",
    "model.logit_scale.max=50": "Limit the logit scale to 50",
    "model.text.weights=pretrained": "Start the text tower from pretrained weights",
    "model.vision.frozen=true": "Freeze the image tower",
    "model.vision.weights=pretrained": "Start the image tower from pretrained weights",
    "negatives.gather=true": "Gather the negatives of all ranks",
    "negatives.queue.size=4096": "Keep a queue of negatives from earlier batches",
    "optim.clip_norm=1.0": "Clip gradients to a norm of 1",
    "optim.lr=1e-4": "Lower the learning rate",
    "optim.lr_scale.head=1.0": "Train the heads at the full learning rate",
    "optim.lr_scale.scale=0.1": "Train the logit scale at a tenth of the learning rate",
    "optim.lr_scale.scale=1.0": "Train the logit scale at the full learning rate",
    "optim.lr_scale.text=0.1": "Train the text tower at a tenth of the learning rate",
    "optim.lr_scale.vision=0.1": "Train the image tower at a tenth of the learning rate",
    "optim.warmup=1000 steps": "Warm the learning rate up over more updates",
    "optim.weight_decay=0.01": "Lower the weight decay",
    "optim.weight_decay=0.2": "Raise the weight decay",
    "optim.weight_decay_scale.scale=0.0": "Take the logit scale out of weight decay",
    "train.duration=5 epochs": "Train for fewer epochs",
    "train.global_batch_size=1024": "Train with larger batches",
}


def in_words(remedies: Iterable[str]) -> tuple[str, ...]:
    """What the settings do, for who trained with other code."""
    return tuple(_IN_WORDS[word] for word in remedies)


def not_yet_set(remedies: Iterable[str], config: Config, updates: int) -> tuple[str, ...]:
    """The remedies that would change a run.

    Left out are settings that the run has, ones that it goes beyond, and a warm-up that is no
    shorter than the run.

    Args:
        remedies: `key=value`.
        config: What the run was trained with.
        updates: How long it was.
    """
    settings = config.model_dump(mode="json")
    return tuple(word for word in remedies if _would_help(word, config, settings, updates))


def _would_help(word: str, config: Config, settings: Mapping[str, Any], updates: int) -> bool:
    key, _, value = word.partition("=")
    now = _at(settings, key)
    if key == _BOUND and now == "auto":
        now = config.model.logit_scale.limit
    if key == _WARMUP:
        before, after = Duration.parse(now), Duration.parse(value)
        longer = before.unit != after.unit or after.amount > before.amount
        return longer and after.amount < updates
    if str(now) == value or _is_beyond(key, now, value):
        return False
    try:
        return _in_force(with_words(config, [word])) != _in_force(with_words(config, []))
    except ConfigError:
        # What else is set stands against it, such as terms against a preset: that is for the user
        # to weigh.
        return True


def _in_force(config: Config) -> Config:
    """Without the name of the objective, whose terms are there beside it."""
    return config.model_copy(update={"loss": config.loss.model_copy(update={"preset": None})})


def _is_beyond(key: str, now: Any, value: str) -> bool:
    if isinstance(now, bool) or not isinstance(now, int | float):
        return False
    if key in _MORE:
        return now >= float(value)
    return key in _LESS and now <= float(value)


def _at(settings: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings
