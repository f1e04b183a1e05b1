"""A page's pictures in their order, each with its name and what to look for."""

from collections.abc import Iterable
from dataclasses import dataclass

from mmscale.report.moments import draw_similarity, draw_similarity_over_time, draw_spectrum
from mmscale.report.plots import (
    draw_balance,
    draw_gradient_norms,
    draw_loss,
    draw_recall,
    draw_schedule,
    draw_terms,
    draw_time,
)
from mmscale.report.series import Lines
from mmscale.report.space import Moments

TIME = "Where the time goes"


@dataclass(frozen=True)
class Picture:
    """A picture as the page shows it.

    Attributes:
        title: Its name.
        source: The picture itself, as a `data:` URI.
        caption: What to look for.
        wide: Whether it takes the page's whole width.
    """

    title: str
    source: str
    caption: str = ""
    wide: bool = False


def training_pictures(lines: Lines) -> list[Picture]:
    """What could be drawn of the course of a run."""
    drawn = [
        (
            "Loss",
            draw_loss(lines),
            "It should leave the chance line within the first tenth of the run and keep falling; "
            "a curve that hugs the line has learnt nothing about pairs.",
        ),
        (
            "Recall on held-out pairs",
            draw_recall(lines),
            "Both directions should rise together; a fall while the loss still sinks is "
            "overfitting.",
        ),
        (
            "Gradient norms",
            draw_gradient_norms(lines),
            "A line that drops away from the others is a part that no longer learns; spikes of ten "
            "times the usual ask for a lower rate.",
        ),
        (
            "Gradient balance",
            draw_balance(lines),
            "Both towers should learn: outside the band one of them gets ten times the gradient "
            "of the other.",
        ),
        (
            "Terms of the loss",
            draw_terms(lines),
            "Each term should move from its chance value towards its floor; one that stays where "
            "it began adds nothing.",
        ),
        (
            "Learning rate and logit scale",
            draw_schedule(lines),
            "The scale should move slowly and settle below its limit; one that sits at the limit "
            "is saturated.",
        ),
        (
            TIME,
            draw_time(lines),
            "Forward and backward should fill most of an update; much data is too few "
            "data.workers, much communication too small a batch a rank. ZeRO's own exchanges stand "
            "in backward and optimizer.",
        ),
    ]
    return _those_drawn(drawn, wide=("Terms of the loss", "Learning rate and logit scale", TIME))


def space_pictures(moments: Moments) -> list[Picture]:
    """What could be drawn of the embedding space at the evaluations."""
    drawn = [
        (
            "Similarity of pairs",
            draw_similarity(moments),
            "The matched pairs should form a hill of their own to the right; two hills on top of "
            "each other mean that images and captions are unaligned.",
        ),
        (
            "Similarity over time",
            draw_similarity_over_time(moments),
            "From top to bottom the two hills should part. Hills that become needles beside each "
            "other are a space that collapses.",
        ),
        (
            "Covariance spectrum",
            draw_spectrum(moments),
            "Later curves should be flatter, or at least not lower: a curve that breaks off uses "
            "few directions, one that sinks as a whole is a space that contracts.",
        ),
    ]
    return _those_drawn(drawn, wide=("Covariance spectrum",))


def _those_drawn(
    drawn: Iterable[tuple[str, str | None, str]], wide: tuple[str, ...] = ()
) -> list[Picture]:
    return [
        Picture(title, source, caption, title in wide)
        for title, source, caption in drawn
        if source is not None
    ]
