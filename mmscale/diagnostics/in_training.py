"""What only a run in training knows of itself: figures of its own batches, weights that stand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.diagnostics.geometry import PREFIX

STILL = "still"
_MOST_NAMED = 5


@dataclass(frozen=True)
class InTraining:
    """What a run's last probe saw of its training pairs.

    Attributes:
        pairs: Training pairs that were measured.
        auc: Of them.
        loss_progress: Of them.
        backbone_cka_z: Of the towers' own features of them.
        still: Trained parameters that no gradient has moved so far.
    """

    pairs: int
    auc: float
    loss_progress: float
    backbone_cka_z: float | None = None
    still: tuple[str, ...] = ()

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "InTraining | None":
        """From a probe's line; None where it lacks the figures."""
        names = ("pairs", "auc", "loss_progress")
        if any(line.get(PREFIX + name) is None for name in names):
            return None
        return cls(
            pairs=int(line[f"{PREFIX}pairs"]),
            auc=line[f"{PREFIX}auc"],
            loss_progress=line[f"{PREFIX}loss_progress"],
            backbone_cka_z=line.get(f"{PREFIX}backbone_cka_z"),
            still=tuple(str(name) for name in line.get(STILL) or ()),
        )

    @classmethod
    def last_of(cls, lines: Iterable[Mapping[str, Any]]) -> "InTraining | None":
        """From the last probe of a run's log."""
        found = None
        for line in lines:
            found = cls.of(line) or found
        return found

    def cause(self) -> tuple[str, ...]:
        """What to check first where weights stand still."""
        # Not every loss has a use for the scale.
        still = [name for name in self.still if not name.startswith("scale.")]
        if not still:
            return ()
        named = ", ".join(still[:_MOST_NAMED])
        more = f" and {len(still) - _MOST_NAMED} more" * (len(still) > _MOST_NAMED)
        return (
            f"No gradient has moved {named}{more}: detached, masked, or outside of what the loss "
            "sees",
        )
