"""When a verdict counts: what one probe finds may be chance or pass, what several find does not."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmscale.diagnostics.doctor import Diagnosis, finding_of
from mmscale.diagnostics.finding import Figures
from mmscale.diagnostics.geometry import PREFIX
from mmscale.diagnostics.rules import COLLAPSED_VARIANCE, RULES, VANISHED_VARIANCE
from mmscale.diagnostics.rules_pairing import ALIGNED_Z

COLLAPSE, DEAD = "complete_collapse", "dead_tower"

# A tower that holds less than this variance, and a quarter of what it held, has contracted. Healthy
# runs were seen to do that for some steps too, while their pairs stood out ever more.
CONTRACTED = COLLAPSED_VARIANCE
CONTRACTED_SHARE = 0.25

# Rise of the pairing's z over its best before that counts as learning.
LEARNING = 1.02


@dataclass(frozen=True)
class Alarm:
    """A verdict that held over several probes.

    Attributes:
        diagnosis: Of the last of them, with this verdict first.
        began: Step of the first of them.
    """

    diagnosis: Diagnosis
    began: int

    def to_json(self) -> dict[str, Any]:
        """As one rank tells the others."""
        return {"diagnosis": self.diagnosis.to_json(), "began": self.began}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Alarm":
        """What `to_json` gave."""
        return cls(Diagnosis.of(told["diagnosis"]), told["began"])


class Persistence:
    """Takes one probe after another.

    Args:
        patience: Probes in a row that must agree.
        grace: Until this step only a contraction counts.
        verdicts: Which of them count.
    """

    def __init__(self, patience: int, grace: int, verdicts: tuple[str, ...]):
        self._patience, self._grace, self._verdicts = patience, grace, verdicts
        self._recent: deque[tuple[int, frozenset[str]]] = deque(maxlen=patience)
        self._widest = dict.fromkeys(("image", "text"), 0.0)
        self._best_z = 0.0
        self._told: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {
            "recent": [[step, sorted(names)] for step, names in self._recent],
            "widest": dict(self._widest),
            "best_z": self._best_z,
            "told": sorted(self._told),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; `patience` and `verdicts` may have changed since."""
        self._recent.clear()
        for step, names in state["recent"]:
            self._recent.append((int(step), frozenset(names) & set(self._verdicts)))
        self._widest = {side: float(state["widest"][side]) for side in self._widest}
        self._best_z, self._told = float(state["best_z"]), set(state["told"])

    def begin(self, figures: Figures) -> None:
        """Take the space before the first update: what it contracts from."""
        self._contracted(figures)

    def take(self, step: int, figures: Figures, diagnosis: Diagnosis) -> Alarm | None:
        """The verdict that has held long enough, each time anew; None without one.

        Args:
            step: After which the probe was taken; they rise.
            figures: What it measured, under `health/`.
            diagnosis: What the doctor says of them.
        """
        found = {diagnosis.verdict, *diagnosis.also} if step > self._grace else set()
        contracted = self._contracted(figures)
        if contracted:
            found.add(COLLAPSE if len(contracted) == 2 else DEAD)
        if self._is_learning(figures) and not _has_vanished(figures):
            found -= {COLLAPSE, DEAD}
        self._recent.append((step, frozenset(found & set(self._verdicts))))
        self._told &= set().union(*(names for _, names in self._recent))
        if len(self._recent) < self._patience:
            return None
        lasting = frozenset.intersection(*(names for _, names in self._recent)) - self._told
        name = next((name for name in RULES if name in lasting), None)
        if name is None:
            return None
        self._told.add(name)
        return Alarm(_first(name, figures, diagnosis), self._recent[0][0])

    def _contracted(self, figures: Figures) -> list[str]:
        """Towers whose space has contracted."""
        widths = {side: figures[f"{PREFIX}variance_{side}"] for side in self._widest}
        sides = [
            side
            for side, width in widths.items()
            if width < min(CONTRACTED, CONTRACTED_SHARE * self._widest[side])
        ]
        self._widest = {side: max(width, self._widest[side]) for side, width in widths.items()}
        return sides

    def _is_learning(self, figures: Figures) -> bool:
        """Whether pairs stand out more than ever before."""
        z, before = figures[f"{PREFIX}delta_z"], max(self._best_z, ALIGNED_Z)
        self._best_z = max(self._best_z, z)
        return z > LEARNING * before


def _has_vanished(figures: Figures) -> bool:
    """Whether a tower is so narrow that it fails whatever its pairs still tell."""
    return (
        min(figures[f"{PREFIX}variance_{side}"] for side in ("image", "text")) < VANISHED_VARIANCE
    )


def _first(name: str, figures: Figures, diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis with one of its names as the verdict."""
    if diagnosis.verdict == name:
        return diagnosis
    others = tuple(n for n in (diagnosis.verdict, *diagnosis.also) if n not in (name, "healthy"))
    return replace(finding_of(name, figures), also=others)
