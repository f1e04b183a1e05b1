"""Settings of what ends a run before its time."""

from typing import Annotated

from pydantic import Field

from mmscale.config.section import Positive, Section


class StopConfig(Section):
    """What ends a run before its time."""

    metric: str = "eval/mean"
    """Figure of the evaluations that early stopping, plateaus and stages' patience watch."""
    patience: Positive | None = None
    """Evaluations without a new best after which the run ends as if complete; null: never."""
    above_chance: Positive | None = 500
    """Updates after warm-up whose mean loss must lie below chance, else exit 3; null: no guard."""
    rise: Annotated[float, Field(gt=1)] | None = None
    """Exit 3 when the mean loss of 50 updates is so many times the lowest such mean; null: off."""
