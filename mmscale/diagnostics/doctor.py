"""From embedded pairs to a verdict: what is wrong, on which figures, why, and what to set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmscale.diagnostics.finding import Figures, Finding, picked
from mmscale.diagnostics.forgetting import Forgetting
from mmscale.diagnostics.geometry import PREFIX, health_figures
from mmscale.diagnostics.mixture import FEWEST_PAIRS, mixture_figures
from mmscale.diagnostics.order import order_figures
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.rules import RULES, too_few_samples
from mmscale.diagnostics.rules_pairing import SHARES, pairs_in_doubt

HEALTHY = "healthy"
STILL = "still"
_MOST_NAMED = 5


@dataclass(frozen=True)
class InTraining:
    """What a run's last probe saw of its training pairs.

    Attributes:
        pairs: Training pairs that were measured.
        auc: Their `health/auc`.
        loss_progress: Their `health/loss_progress`.
        backbone_cka_z: The `cka_z` of the towers' own features of them.
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


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says.

    Attributes:
        verdict: The first name in `rules.RULES` that holds; `healthy` if no other does.
        also: The other names that hold, in the same order.
        confidence: As in `Finding`: how sure the verdict is on its figures, not what caused it.
        evidence: The figures that decided it, as under `health/`.
        causes: In the order to check.
        remedies: Words for the command line, `key=value`.
        pairs: Distinct images with a caption that were measured.
        would_change: Figures at which the verdict would be another.
    """

    verdict: str
    also: tuple[str, ...]
    confidence: float
    evidence: dict[str, float]
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    pairs: int
    would_change: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Diagnosis":
        """What `to_json` gave."""
        lists = {name: tuple(record[name]) for name in ("also", "causes", "remedies")}
        return cls(**{**record, **lists})

    @property
    def healthy(self) -> bool:
        """True where nothing that the doctor knows is wrong."""
        return self.verdict == HEALTHY

    def to_json(self) -> dict[str, Any]:
        """The record of `mmscale doctor --json` and of a run's `doctor.json`."""
        return {
            "verdict": self.verdict,
            "also": list(self.also),
            "confidence": self.confidence,
            "evidence": dict(self.evidence),
            "causes": list(self.causes),
            "remedies": list(self.remedies),
            "pairs": self.pairs,
            "would_change": self.would_change,
        }


def diagnose(
    pairs: Pairs, training: InTraining | None = None, forgetting: Forgetting | None = None
) -> Diagnosis:
    """The verdict on one set of pairs, the same each time for the same pairs.

    `healthy` means that none of the failures in `rules.RULES` shows; it is no praise of the
    recalls.

    Args:
        pairs: Held-out pairs.
        training: What the run knows of its training pairs, where there is a run.
        forgetting: What it has lost since its start, where it looks at that.
    """
    figures = health_figures(pairs) | pairing_figures(pairs) | mixture_figures(pairs)
    if pairs_in_doubt(bare(figures)):
        figures |= order_figures(pairs)
    if training is not None:
        # As many on both sides: the loss of more pairs is another.
        figures |= beside(training, health_figures(pairs, training.pairs))
    if forgetting is not None:
        figures |= {PREFIX + name: value for name, value in forgetting.figures().items()}
    return judge(figures, training)


def beside(training: InTraining, held_out: Figures) -> dict[str, float]:
    """Figures of training pairs and of as many held-out ones, as rules that compare them read."""
    figures = {
        "train_loss_progress": training.loss_progress,
        "heldout_loss_progress": held_out.get(f"{PREFIX}loss_progress"),
        "train_auc": training.auc,
        "train_backbone_cka_z": training.backbone_cka_z,
    }
    return {f"{PREFIX}{name}": value for name, value in figures.items() if value is not None}


def judge(health: Figures, training: InTraining | None = None) -> Diagnosis:
    """The verdict on figures under `health/`."""
    diagnosis = _judge(health)
    if training is None or diagnosis.healthy:
        return diagnosis
    return replace(diagnosis, causes=(*training.cause(), *diagnosis.causes))


def finding_of(name: str, health: Figures) -> Diagnosis:
    """What the rule of one verdict says, whether or not it holds by itself."""
    figures = bare(health)
    return _diagnosis(name, (), RULES[name](figures), figures)


def bare(health: Figures) -> dict[str, float]:
    """Figures by the names that rules know them by."""
    return {name.removeprefix(PREFIX): value for name, value in health.items()}


def _judge(health: Figures) -> Diagnosis:
    figures = bare(health)
    few = too_few_samples(figures)
    if few.holds:
        # On so few rows no other figure is to be believed.
        return _diagnosis("too_few_samples", (), few, figures)
    findings = {name: rule(figures) for name, rule in RULES.items()}
    holding = [name for name, finding in findings.items() if finding.holds]
    if holding:
        return _diagnosis(holding[0], tuple(holding[1:]), findings[holding[0]], figures)
    names = ("auc_centred", "delta_z", *SHARES, "variance_image", "variance_text")
    evidence = picked(figures, *names)
    sure = min(finding.confidence for finding in findings.values())
    return _diagnosis(HEALTHY, (), Finding(True, sure, evidence, turns=_unseen(figures)), figures)


def _unseen(figures: Figures) -> str:
    """What so many healthy pairs may still hide."""
    low = figures.get("matched_share_low")
    if low is None:
        return f"mispaired captions, which only {FEWEST_PAIRS} pairs and more can show"
    return f"mispaired captions, of which {1 - low:.1%} would not show on so many pairs"


def _diagnosis(
    verdict: str, also: tuple[str, ...], finding: Finding, figures: Figures
) -> Diagnosis:
    return Diagnosis(
        verdict,
        also,
        finding.confidence,
        finding.evidence,
        finding.causes,
        finding.remedies,
        int(figures["pairs"]),
        finding.turns,
    )
