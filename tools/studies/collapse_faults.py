"""Failures made on purpose, for the study `collapse`: in the data, on its way, or in settings.

Nothing here knows how the doctor tells them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.studies.given import Features


def same(pairs: Features, seed: int) -> Features:
    """Nothing is wrong."""
    return pairs


def mispaired(pairs: Features, seed: int) -> Features:
    """Each image has another's caption, the same one every time."""
    return replace(pairs, text=pairs.text[_mixed(len(pairs), seed)])


def constant_images(pairs: Features, seed: int) -> Features:
    """Every image gives the same features: a wrong layer, zeroed pixels, a NaN set to zero."""
    return replace(pairs, image=pairs.image[:1].expand_as(pairs.image).clone())


def without_ids(pairs: Features, seed: int) -> Features:
    """Every row passes for an image of its own."""
    return replace(pairs, ids=torch.arange(len(pairs)))


def few(pairs: Features, seed: int) -> Features:
    """A hundredth of what there is, yet enough for some batches."""
    return pairs.rows(_mixed(len(pairs), seed)[: max(128, len(pairs) // 100)])


def _mixed(num: int, seed: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(1000 + seed))


@dataclass(frozen=True)
class Fault:
    """One failure.

    Attributes:
        words: Settings that cause it.
        train: What becomes of the training pairs.
        held_out: What becomes of the held-out pairs.
        mixes_batches: Captions of each batch are dealt out anew.
        captions: Captions of each image that are rows.
        mended: What undoes it, in words for a reader.
    """

    words: tuple[str, ...] = ()
    train: Callable[[Features, int], Features] = same
    held_out: Callable[[Features, int], Features] = same
    mixes_batches: bool = False
    captions: int = 1
    mended: str = ""


HEALTHY = "none"
FAULTS: dict[str, Fault] = {
    HEALTHY: Fault(),
    "pairs mixed in the file": Fault(train=mispaired, mended="pair the file anew"),
    "pairs mixed in the collate": Fault(mixes_batches=True, mended="fix the collate"),
    "pairs mixed in evaluation": Fault(held_out=mispaired, mended="key results by id"),
    "hardest negatives at once": Fault(
        ('loss.terms=[{"kind": "hinge"}]', "optim.lr=0.03"), mended="all negatives first, or slower"
    ),
    "rate too high": Fault(
        ("model.head.kind=mlp", "optim.lr=0.3", "optim.clip_norm=null"), mended="a lower rate"
    ),
    "dead tower": Fault(train=constant_images, held_out=constant_images, mended="fix the input"),
    "heads not trained": Fault(("optim.lr_scale.head=0",), mended="train them"),
    "low-rank head": Fault(
        ("model.head.kind=mlp", "model.head.hidden=4"), mended="a head of full rank"
    ),
    "scale saturated": Fault(
        (
            "model.logit_scale.init=1000",
            "model.logit_scale.max=1000",
            "model.logit_scale.learn=false",
        ),
        mended="start it at 14",
    ),
    "scale stuck at 1": Fault(
        ("model.logit_scale.init=1", "optim.lr_scale.scale=0"), mended="train it"
    ),
    "duplicates without ids": Fault(
        train=without_ids, held_out=without_ids, captions=5, mended="give rows their image's id"
    ),
    "tiny batch": Fault(("train.global_batch_size=4",), mended="a larger batch"),
    "overfitting": Fault(
        ("model.head.kind=mlp", "model.head.hidden=1024"), train=few, mended="more pairs"
    ),
}


def dealt_anew(batch: Features) -> Features:
    """The batch with its captions among other images, another way each time."""
    return replace(batch, text=batch.text.roll(1, dims=0))
