"""Settings of the guard: what a run does when its probes find the embedding space failing."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

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


def _without_remedy(action: Any) -> Any:
    if action == "remedy":
        raise ValueError(
            "off, warn or halt: a run no longer changes its own settings; start it again with the "
            "words that doctor.json recommends"
        )
    return action


class GuardConfig(Section):
    """What a run does when its probes find the embedding space failing."""

    action: Annotated[Literal["off", "warn", "halt"], BeforeValidator(_without_remedy)] = "warn"
    """`warn`: say so; `halt`: end with exit 3, a checkpoint and `doctor.json`."""
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
