"""What the page tells in figures: recalls against chance, what chance is, how long the run was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmscale.config.loss import AnyTerm
from mmscale.loss.objective import named
from mmscale.report.console import duration
from mmscale.report.metrics import TOP, WAYS, Lines, series, set_names


@dataclass(frozen=True)
class Recalls:
    """The last evaluation.

    Attributes:
        step: Updates made before it.
        images: Images searched, as text.
        captions: Captions searched, as text.
        rows: For each direction its name and, for each K, (recall, chance) in percent.
    """

    step: str
    images: str
    captions: str
    rows: list[tuple[str, list[tuple[str, str]]]]


def collect_recalls(lines: Lines, prefix: str = "eval/") -> Recalls | None:
    """Recalls of the last line that holds any, beside what drawing blindly gives.

    Args:
        lines: The log.
        prefix: What the figures of the evaluation set begin with.
    """
    held = [line for line in lines if any(f"{prefix}{way}_r1" in line for way in WAYS)]
    if not held:
        return None
    line = {
        key.removeprefix(prefix): value for key, value in held[-1].items() if key.startswith(prefix)
    }
    rows = [
        (name, [(_text(line.get(f"{way}_r{k}"), ".1f"), _chance(line, way, k)) for k in TOP])
        for way, name in WAYS.items()
    ]
    images, captions = (_text(line.get(key), ",") for key in ("images", "captions"))
    return Recalls(_text(held[-1].get("step"), ","), images, captions, rows)


@dataclass(frozen=True)
class Accuracies:
    """The last zero-shot classification of a set.

    Attributes:
        step: Updates made before it.
        images: As text.
        classes: As text.
        cells: Name of each figure with its value in percent and, where there is one, chance's.
    """

    step: str
    images: str
    classes: str
    cells: list[tuple[str, str, str]]


def collect_sets(lines: Lines) -> dict[str, Recalls | Accuracies]:
    """What was last found on each named set."""
    found = {
        name: _accuracies(lines, f"eval/{name}/") or collect_recalls(lines, f"eval/{name}/")
        for name in set_names(lines)
    }
    return {name: figures for name, figures in found.items() if figures}


def _accuracies(lines: Lines, prefix: str) -> Accuracies | None:
    held = [line for line in lines if f"{prefix}top1" in line]
    if not held:
        return None
    line, classes = held[-1], held[-1].get(f"{prefix}classes")
    chance = {"top1": 1, "top5": 5, "mean_per_class": 1}
    cells = [
        (
            name.replace("_", " "),
            _text(line.get(f"{prefix}{name}"), ".1f"),
            f"{100 * count / classes:.2f}" if classes else "?",
        )
        for name, count in chance.items()
        if f"{prefix}{name}" in line
    ]
    images = _text(line.get(f"{prefix}images"), ",")
    return Accuracies(_text(line.get("step"), ","), images, _text(classes, ","), cells)


def collect_facts(lines: Lines) -> list[tuple[str, str]]:
    """Name and value of each figure that the lines can give."""
    training = [line for line in lines if "loss" in line]
    finished = next((line for line in reversed(lines) if line.get("finished")), None)
    facts = [("state", "finished" if finished else "not finished")]
    if training:
        facts += [
            ("steps", _text(training[-1].get("step"), ",")),
            ("pairs seen", _text(training[-1].get("samples"), ",")),
        ]
    facts += [
        (name, value)
        for name, value in (
            ("training time", _training_time(training)),
            ("speed, median", _median(training, "samples_per_second", ",.0f", " pairs/s")),
            ("waiting for data, median", _median(training, "data_wait", ".1%")),
            ("products, median", _median(training, "flops_per_second", ".3g", " FLOP/s")),
            ("share of the peak (MFU), median", _median(training, "mfu", ".1%")),
            ("captions cut at the tower's context, mean", _mean(training, "captions_cut")),
            ("memory, at most", _gigabytes(training)),
            ("last loss", _last(training, "loss", ".4f", " nats")),
            ("loss at chance", _last(training, "loss_chance", ".4f", " nats")),
            ("last logit scale", _last(training, "logit_scale", ".2f")),
        )
        if value is not None
    ]
    return facts


def _training_time(training: Lines) -> str | None:
    """Pairs over speed, summed line by line: pauses between restarts do not count."""
    seconds, seen = 0.0, 0
    for line in training:
        speed, samples = line.get("samples_per_second"), line.get("samples")
        if speed and samples:
            seconds += max(0, samples - seen) / speed
            seen = samples
    return duration(seconds) if seconds else None


def _median(training: Lines, key: str, form: str, unit: str = "") -> str | None:
    curve = series(training, key)
    return None if curve is None else f"{np.median(curve.values):{form}}{unit}"


def _mean(training: Lines, key: str) -> str | None:
    curve = series(training, key)
    return None if curve is None else f"{np.mean(curve.values):.1%}"


def _gigabytes(training: Lines) -> str | None:
    curve = series(training, "memory_bytes")
    return None if curve is None else f"{curve.values.max() / 1e9:.2f} GB (main rank)"


def _last(training: Lines, key: str, form: str, unit: str = "") -> str | None:
    curve = series(training, key)
    return None if curve is None else f"{curve.values[-1]:{form}}{unit}"


def _chance(line: Mapping[str, Any], way: str, k: int) -> str:
    images, captions = line.get("images"), line.get("captions")
    if not images or not captions:
        return "?"
    if way == "i2t":
        return f"{chance_recall(k, captions, captions / images):.2f}"
    return f"{chance_recall(k, images):.2f}"


def _text(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def chance_loss(terms: tuple[AnyTerm, ...], measured: Mapping[str, float]) -> float | None:
    """The objective of a model that cannot tell the pairs of a batch apart.

    Args:
        terms: `loss.terms`.
        measured: What the update's record says of them: `StepRecord.terms`.

    Returns:
        None where the chance value of a term at work is not a function of the batch.
    """
    total = 0.0
    for name, term in named(terms).items():
        # A term of weight 0 is not measured.
        if name not in measured:
            continue
        if (chance := measured.get(f"{name}_chance")) is None:
            return None
        total += measured.get(f"{name}_weight", term.weight.last) * chance
    return total


def chance_recall(k: int, num_candidates: int, num_correct: float = 1) -> float:
    """Percent of queries with a correct candidate among k drawn blindly, without putting back.

    Args:
        k: Candidates looked at.
        num_candidates: Candidates in all.
        num_correct: Correct candidates of a query; an average over queries need not be whole.
    """
    missed = 1.0
    for drawn in range(min(k, num_candidates)):
        missed *= max(0.0, 1 - num_correct / (num_candidates - drawn))
    return 100 * (1 - missed)
