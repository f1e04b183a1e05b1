"""Settings of the guard: what a run does when its probes find the embedding space failing."""

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.duration import Duration
from mmscale.config.section import Positive, Section

Verdict = Literal[
    "complete_collapse",
    "dead_tower",
    "dimensional_collapse",
    "shuffled_pairs",
    "unaligned",
    "scale_saturated",
    "scale_stuck_low",
    "overfit",
    "false_negatives",
    "hubness",
]


class GuardConfig(Section):
    """What a run does when its probes find the embedding space failing."""

    action: Literal["off", "warn", "halt", "remedy"] = "warn"
    """`warn`: say so; `halt`: end with exit 3, a checkpoint and `doctor.json`; `remedy`: set what
    mends the verdict, once, and go on from the last healthy checkpoint."""
    patience: Annotated[int, Field(ge=2)] = 3
    """Probes in a row that must find the same before it counts."""
    grace: Duration = Duration(200, "steps")
    """Beginning of the run in which only a contraction of the space counts: an untrained model is
    unaligned."""
    verdicts: tuple[Verdict, ...] = (
        "complete_collapse",
        "dead_tower",
        "dimensional_collapse",
        "shuffled_pairs",
        "unaligned",
    )
    """Which verdicts count."""


class ProbeConfig(Section):
    """Figures of the embedding space and of the update, taken while training."""

    every: Duration = Duration(50, "steps")
    """How often the global batch and as many fixed held-out pairs are measured."""
    held_out: Positive = 256
    """Held-out pairs of each probe, no more than the global batch."""
