"""What a rule of the doctor answers, and the arithmetic of being sure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """One rule's answer.

    Attributes:
        holds: Whether the verdict applies.
        confidence: Share of other samples of this size on which the answer would be the same, by a
            normal approximation of the figures' sampling error; 0.5 is on the threshold.
        evidence: The figures that decided it.
        causes: What may be behind it, in the order to check.
        remedies: Settings to try, `key=value`.
        turns: Figures at which another answer would be given.
    """

    holds: bool
    confidence: float
    evidence: dict[str, float]
    causes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    turns: str = ""


def below(value: float, threshold: float, error: float) -> float:
    """Chance that another sample's value is below the threshold; over 0.5 if this one's is."""
    if error == 0.0:
        return 1.0 if value < threshold else 0.0
    return 0.5 * (1 + math.erf((threshold - value) / error / math.sqrt(2)))


def picked(figures: Figures, *names: str) -> dict[str, float]:
    """The figures of these names that were measured."""
    return {name: figures[name] for name in names if name in figures}


def decided(
    sure: float,
    evidence: dict[str, float],
    causes: tuple[str, ...],
    remedies: tuple[str, ...],
    turns: str,
) -> Finding:
    """A finding that holds where that is more likely than not."""
    holds = sure > 0.5
    return Finding(holds, sure if holds else 1 - sure, evidence, causes, remedies, turns)
