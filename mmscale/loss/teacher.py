"""Distillation from a frozen teacher: its similarities, or its rows."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.taught import AnchorTerm, L2StartTerm, TeacherTerm
from mmscale.contracts import START, LossInput, Taught
from mmscale.loss.contrast import Contrast, PairRows, directions, wide
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Counts, Given, TermValue, term


class Mimicked(NamedTuple):
    """The loss, and the mean entropy of the teacher's distributions, which say what chance is."""

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def affinity(
    pairs: PairRows,
    taught: tuple[Float[Tensor, "b e"], Float[Tensor, "b e"]],
    scale: Float[Tensor, "1"],
    teacher_scale: Float[Tensor, "1"],
) -> Mimicked:
    """Mean KL(p_i || q_i) of what a row resembles, to the teacher and to us; both directions.

    For each image i over the captions j of the global batch p_ij = softmax_j(s' u_i.v_j) and
    q_ij = softmax_j(s x_i.y_j); loss = mean_i sum_j p_ij (ln p_ij - ln q_ij). The same for each
    caption over the images; the mean of both. Ids play no part: the teacher says what is alike.

    Args:
        pairs: Our rows.
        taught: The teacher's unit rows of the same pairs, without a gradient.
        scale: 1 / our temperature.
        teacher_scale: 1 / the teacher's temperature.

    Source: Wu et al. 2023, "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight
        Inheritance" (arXiv 2309.12314), whose affinity mimicking is a cross-entropy: this plus the
        teacher's entropy; Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP Model
        Distillation" (arXiv 2307.12732), contrastive relational distillation.
    """

    def sums(own: Contrast, judged: Contrast, scale: Float[Tensor, "1"]) -> Sums:
        seen = (scale * own.similarity).log_softmax(1)
        with torch.no_grad():
            log_target = (teacher_scale * judged.similarity).log_softmax(1)
            target = log_target.exp()
            entropy = -(target * log_target).sum()
        return (target * (log_target - seen)).sum(), entropy

    image, text = taught
    judges = directions(replace(pairs, image=image, text=text))
    found = [
        sum_over_rows(sums, [own, judge], scale)
        for own, judge in zip(directions(pairs), judges, strict=True)
    ]
    losses, entropies = (
        [total / len(pairs.ids) for total in both] for both in zip(*found, strict=True)
    )
    return Mimicked((losses[0] + losses[1]) / 2, (entropies[0] + entropies[1]) / 2)


def feature(
    rows: tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]],
    taught: tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]],
) -> Float[Tensor, ""]:
    """Mean squared distance of our unit rows to the teacher's; the mean of both modalities.

    mean_i |x_i - u_i|^2 = 2 - 2 mean_i x_i.u_i for images, the same for captions.

    Source: Yang et al. 2024, "CLIP-KD" (arXiv 2307.12732), feature distillation; a mean over the
        modalities in place of a sum.
    """
    image, text = (
        (wide(own) - wide(theirs)).pow(2).sum(1).mean()
        for own, theirs in zip(rows, taught, strict=True)
    )
    return (image + text) / 2


@term(TeacherTerm)
def _teacher(settings: TeacherTerm, given: Given) -> TermValue:
    taught = given.rows.teachers.get(settings.model)
    return _compared(settings, given, given.needed(taught, settings, "teacher's rows"))


@term(AnchorTerm)
def _anchor(settings: AnchorTerm, given: Given) -> TermValue:
    rows: LossInput | None = given.rows
    if settings.data is not None:
        rows = given.rows.beside.get(settings.data)
    found = given.needed(rows, settings, f"rows of {settings.data}")
    taught = given.needed(found.teachers.get(START), settings, "rows of its start")
    value = _compared(settings, replace(given, rows=found), taught)
    if settings.data is None or settings.form == "feature":
        return value
    # The counts are those of the batch.
    return TermValue(value.loss, lambda counts: Bounds(0.0))


@term(L2StartTerm)
def _l2_start(settings: L2StartTerm, given: Given) -> TermValue:
    distance = given.needed(given.rows.distance, settings, "distance to its start")
    return TermValue(distance, lambda counts: Bounds(0.0))


def _compared(settings: AnchorTerm | TeacherTerm, given: Given, taught: Taught) -> TermValue:
    if settings.form == "feature":
        loss = feature(_as_wide(given, taught), (taught.image, taught.text))
        return TermValue(loss, lambda counts: Bounds(0.0, 2.0))
    own = given.scale(settings.temperature)
    theirs = taught.scale
    if settings.teacher_temperature is not None:
        theirs = torch.full_like(theirs, 1 / settings.teacher_temperature)
    found = affinity(given.pairs, (taught.image, taught.text), own, theirs)

    def bounds(counts: Counts) -> Bounds:
        columns = counts.positives + counts.negatives
        return Bounds(0.0, columns.log().mean() - found.entropy)

    return TermValue(found.loss, bounds)


def _as_wide(given: Given, taught: Taught) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    image, text = given.rows.image.unit, given.rows.text.unit
    # Told in words before training begins.
    assert image.shape[1] == taught.image.shape[1], "features are as wide as the embeddings"
    return image, text
