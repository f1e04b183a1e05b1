"""Remedies for the one who asked: only what is not so already, in words where settings are not his.

Rules name settings, `key=value`. Whoever trained with other code reads what they do instead.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mmscale.config.load import with_words
from mmscale.config.schema import Config
from mmscale.config.values import Duration
from mmscale.errors import ConfigError

# What goes further than the remedy does is no less of one.
_MORE = (
    "train.global_batch_size",
    "negatives.queue.size",
    "model.embed_dim",
    "model.head.standardize",
)
_LESS = ("optim.lr", "optim.clip_norm", "model.logit_scale.max", "optim.weight_decay_scale.scale")
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
