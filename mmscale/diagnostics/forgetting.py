"""What a run has lost of what it could do at its start, as the doctor sees it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.config.evaluation import HEADLINES, RetainConfig, logged

# Points that count as lost where a run has no budget of its own.
FORGOTTEN = 2.0
VERDICT = "forgetting"


@dataclass(frozen=True)
class Forgetting:
    """The retained set that has lost most.

    Attributes:
        lost: Points below the start's.
        allowed: Points that it may lose.
        error: Standard error of `lost`, were the images of both evaluations drawn independently;
            those of one set differ less.
    """

    lost: float
    allowed: float
    error: float

    @classmethod
    def of(cls, line: Mapping[str, Any], settings: RetainConfig) -> "Forgetting | None":
        """From an evaluation's line; None where it compares with no start."""
        lost = {name: line.get(f"retain/{name}/lost") for name in settings.sets}
        known = {name: points for name, points in lost.items() if points is not None}
        if not known:
            return None
        name = max(known, key=lambda each: float(known[each]))
        now = next(line[key] for h in HEADLINES if (key := logged(name, h)) in line)
        images = max(1, int(line.get(logged(name, "images"), 1)))
        shares = (now / 100, (now + known[name]) / 100)
        error = 100 * math.sqrt(sum(share * (1 - share) for share in shares) / images)
        allowed = FORGOTTEN if settings.budget is None else settings.budget
        return cls(float(known[name]), allowed, error)

    @classmethod
    def last_of(
        cls, lines: Iterable[Mapping[str, Any]], settings: RetainConfig
    ) -> "Forgetting | None":
        """From the last evaluation of a run's log."""
        found = None
        for line in lines:
            found = cls.of(line, settings) or found
        return found

    def figures(self) -> dict[str, float]:
        """As the rule reads them."""
        return {
            "points_lost": self.lost,
            "points_allowed": self.allowed,
            "points_error": self.error,
        }
