"""The doctor's verdicts in words, how loud each one is, and what its figures are read against."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mmscale.config.explain import first_fault
from mmscale.diagnostics.rules import (
    COLLAPSED_VARIANCE,
    FEWEST_IMAGES,
    LARGEST_KNEE,
    LARGEST_KNEE_OF_FEW,
    MOST_SHARE,
    MOST_SKEW,
    MOST_TWINS,
    MOST_UNCOVERED,
)
from mmscale.diagnostics.rules_pairing import (
    ALIGNED_AUC,
    ALIGNED_Z,
    ELSEWHERE_Z,
    MOSTLY_MISPAIRED_Z,
    PAIRED_Z,
)
from mmscale.errors import DataError


@dataclass(frozen=True)
class Verdict:
    """A verdict as the page shows it.

    Attributes:
        tone: `good`, `warn`, `bad` or `none`.
        title: Two to four words for the badge.
        sentence: What it means for this run.
    """

    tone: str
    title: str
    sentence: str


NOT_DIAGNOSED = Verdict("none", "Not diagnosed", "The doctor has not looked at this run.")

TOO_EARLY = Verdict(
    "none",
    "Too early to say",
    "The run has made too few updates to tell a failure from a beginning.",
)

VERDICTS = {
    "healthy": Verdict(
        "good", "Healthy", "Images and captions share one space, and matched pairs stand out in it."
    ),
    "too_few_samples": Verdict(
        "none", "Too few samples", "There were not enough pairs to tell signal from chance."
    ),
    "complete_collapse": Verdict(
        "bad", "Complete collapse", "All embeddings have become nearly the same vector."
    ),
    "dead_tower": Verdict(
        "bad", "Dead tower", "One tower gives the same embedding whatever it is shown."
    ),
    "dimensional_collapse": Verdict(
        "bad",
        "Dimensional collapse",
        "The embeddings use only a few of the directions that they could.",
    ),
    "shuffled_pairs": Verdict(
        "bad",
        "Shuffled pairs",
        "Images and captions do not belong together row by row: all, or some, are mixed up.",
    ),
    "unaligned": Verdict(
        "bad",
        "Unaligned",
        "Matched pairs are no closer than unmatched ones: the towers have not found each other.",
    ),
    "scale_saturated": Verdict(
        "warn", "Logit scale saturated", "The logit scale sits at its limit, so gradients are tiny."
    ),
    "scale_stuck_low": Verdict(
        "warn",
        "Logit scale stuck low",
        "The logit scale is too small for the loss to tell pairs apart.",
    ),
    "overfit": Verdict(
        "warn", "Overfit", "The model matches its training pairs far better than held-out ones."
    ),
    "forgetting": Verdict(
        "warn",
        "Forgetting",
        "The model has lost more on a set that it was to retain than it may.",
    ),
    "false_negatives": Verdict(
        "warn", "False negatives", "Many pairs treated as negatives are really matches."
    ),
    "hubness": Verdict(
        "warn", "Hubness", "A few items are the nearest neighbours of too many others."
    ),
}


_Scalar = float | int | bool | str | None
_Figure = _Scalar | list[_Scalar]


class _Stored(BaseModel):
    """What a page takes from a `doctor.json`; evidence is two levels deep at most."""

    model_config = ConfigDict(strict=True, extra="ignore")

    verdict: str | None = None
    confidence: float | None = None
    also: list[str] = []
    evidence: dict[str, _Figure | dict[str, _Figure | dict[str, _Figure]]] = {}
    causes: list[str] = []
    remedies: list[str] = []
    pairs: int | None = None
    would_change: str = ""


def read_doctor(path: Path) -> dict[str, Any]:
    """What a `doctor.json` says; where there is no such file, the same without a verdict.

    Raises:
        DataError: The file cannot be read, or is not what the doctor writes.
    """
    if not path.exists():
        return _Stored().model_dump()
    try:
        return _Stored.model_validate_json(path.read_bytes()).model_dump()
    except ValidationError as error:
        raise DataError(
            f"{path}: is not what the doctor writes ({first_fault(error)}); write it again or "
            "remove it"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it") from error


def verdict_named(name: str | None) -> Verdict:
    """The verdict of that name; one that this version does not know keeps its name."""
    if name is None:
        return NOT_DIAGNOSED
    return VERDICTS.get(name, Verdict("warn", name.replace("_", " ").capitalize(), ""))


def verdict_of(diagnosis: Mapping[str, Any]) -> Verdict:
    """The verdict of a `doctor.json`, or of one that was never written."""
    evidence = diagnosis.get("evidence")
    name = diagnosis.get("verdict")
    if name == "too_few_samples" and isinstance(evidence, Mapping) and "updates" in evidence:
        return TOO_EARLY
    return verdict_named(name)


_RANGES = {
    "auc": "chance 0.5, a trained CLIP 0.99",
    "auc_centred": f"good above {ALIGNED_AUC:g}, chance 0.5, a trained CLIP 0.99",
    "delta_z": f"good above {ALIGNED_Z:g}, chance 0",
    "cka_z": f"good above {PAIRED_Z:g}, chance 0",
    "backbone_cka_z": f"good above {PAIRED_Z:g}, chance 0",
    "captions_cka_z": f"good above {PAIRED_Z:g}, chance 0",
    "train_backbone_cka_z": f"good above {PAIRED_Z:g}, chance 0",
    "matched_share": "good near 1; its 95 percent interval follows",
    "mispaired_z": f"good below {MOSTLY_MISPAIRED_Z:g}",
    "elsewhere_z": f"good below {ELSEWHERE_Z:g}",
    "variance": f"good above {COLLAPSED_VARIANCE:g}, a trained CLIP 0.5",
    "std_off_sqrt_d": "near 1 where rows spread in all directions",
    "knee": f"good below {LARGEST_KNEE_OF_FEW:g} of few pairs, {LARGEST_KNEE:g} of many",
    "participation": "good far above 1, a trained CLIP 40",
    "twins": f"good below {MOST_TWINS['image']:g} (captions {MOST_TWINS['text']:g})",
    "hub_skew": f"good below {MOST_SKEW:g}",
    "uncovered": f"good below {MOST_UNCOVERED:g}",
    "row_share": f"good below {MOST_SHARE:g}, 1 where the image alone decides",
    "column_share": f"good below {MOST_SHARE:g}, 1 where the caption alone decides",
    "loss_progress": "chance 0, floor 1",
    "train_loss_progress": "chance 0, floor 1",
    "heldout_loss_progress": "near that of training pairs",
    "pairs": f"at least {FEWEST_IMAGES}",
}


def good_range(name: str) -> str:
    """What a figure of the evidence is read against; empty where there is nothing to say."""
    if name in _RANGES:
        return _RANGES[name]
    base, _, side = name.rpartition("_")
    return _RANGES.get(base, "") if side in ("image", "text", "i2t", "t2i") else ""


def in_lines(diagnosis: Mapping[str, Any]) -> list[str]:
    """A diagnosis for the console: the verdict and what it means, then everything else."""
    verdict = verdict_of(diagnosis)
    sample = f", on {pairs:,} pairs" if (pairs := diagnosis.get("pairs")) else ""
    lines = [
        f"verdict: {diagnosis['verdict']} (confidence {diagnosis['confidence']:.2f}{sample})",
        f"{verdict.title}: {verdict.sentence}" if verdict.sentence else verdict.title,
    ]
    figures = {
        name: f"{name} = {value:.4g}" for name, value in diagnosis.get("evidence", {}).items()
    }
    width = max(map(len, figures.values()), default=0)
    entries = {
        "also": [f"{name}: {verdict_named(name).sentence}" for name in diagnosis["also"]],
        "evidence": [
            f"{text:<{width}}  {good_range(name)}".rstrip() for name, text in figures.items()
        ],
        "causes, in the order to check": diagnosis["causes"],
        "remedies, to try": diagnosis["remedies"],
        "what would change it": list(filter(None, [diagnosis.get("would_change")])),
    }
    for title, texts in entries.items():
        lines += [f"{title}:", *(f"  {text}" for text in texts)] if texts else []
    return lines


@dataclass(frozen=True)
class Figure:
    """A figure of the evidence in words, and what it is read against."""

    name: str
    value: str
    range: str


@dataclass(frozen=True)
class Told:
    """A diagnosis as a page tells it; attributes as in `Diagnosis`."""

    verdict: Verdict
    also: list[Verdict]
    confidence: str
    evidence: list[Figure]
    causes: list[str]
    remedies: list[str]
    pairs: str
    would_change: str


def told(diagnosis: Mapping[str, Any]) -> Told:
    """What `Diagnosis.to_json` or `read_doctor` gave, for a page."""
    return Told(
        verdict_of(diagnosis),
        [verdict_named(name) for name in diagnosis["also"]],
        _share(diagnosis["confidence"]),
        list(_flatten(diagnosis["evidence"])),
        list(diagnosis["causes"]),
        list(diagnosis["remedies"]),
        _in_words(diagnosis["pairs"]),
        diagnosis["would_change"],
    )


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[Figure]:
    """Nested evidence, one figure after another."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}: ")
        else:
            yield Figure(name, _in_words(value), good_range(key))


def _share(value: Any) -> str:
    """A number between 0 and 1 in percent."""
    return f"{value:.0%}" if isinstance(value, float) else _in_words(value)


def _in_words(value: Any) -> str:
    """A figure with as many digits as a reader can use."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_in_words(item) for item in value)
    return "" if value is None else str(value)
