"""A run's HTML page: one file that opens from disk, with everything it shows inside it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale.config.yaml import read_yaml
from mmscale.errors import DataError
from mmscale.report.chance import chance_loss
from mmscale.report.facts import collect_facts, collect_recalls
from mmscale.report.health import draw_health
from mmscale.report.metrics import read_metrics
from mmscale.report.plots import (
    draw_gradient_norms,
    draw_loss,
    draw_recall,
    draw_schedule,
    draw_similarity,
)
from mmscale.report.series import Lines
from mmscale.report.space import SPACE_NAME, Moments, read_space
from mmscale.report.template import write_html
from mmscale.report.verdicts import describe

WIDE_PICTURES = ("Health of the embedding space", "Learning rate and logit scale")


def write_page(run_dir: Path) -> Path:
    """Write `report.html` from what the run folder holds; only `metrics.jsonl` must be there.

    Raises:
        DataError: A file of the folder is missing or cannot be read.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    config_path = run_dir / "config.yaml"
    settings = read_yaml(config_path) if config_path.exists() else {}
    doctor = _read_json(run_dir / "doctor.json")
    chance = chance_loss(settings)
    page = run_dir / "report.html"
    write_html(
        page,
        "page.html",
        title=run_dir.resolve().name,
        verdict=describe(doctor.get("verdict")),
        also=[describe(name) for name in doctor.get("also") or ()],
        confidence=_share(doctor.get("confidence")),
        evidence=dict(_flatten(doctor.get("evidence") or {})),
        causes=[str(cause) for cause in doctor.get("causes") or ()],
        remedies=[str(remedy) for remedy in doctor.get("remedies") or ()],
        recalls=collect_recalls(lines),
        pictures=_pictures(lines, read_space(run_dir / SPACE_NAME), chance),
        facts=collect_facts(lines, chance),
        config_text=config_path.read_text("utf-8") if settings else None,
    )
    return page


def _pictures(lines: Lines, moments: Moments, chance: float | None) -> list[dict[str, Any]]:
    """What could be drawn, each with its name and what to look for."""
    drawn = [
        (
            "Loss",
            draw_loss(lines, chance),
            "It should leave the chance line within the first tenth of the run and keep falling; "
            "a curve that hugs the line has learnt nothing about pairs.",
        ),
        (
            "Similarity of pairs",
            draw_similarity(moments[-1].get("similarity", {}) if moments else {}),
            "The matched pairs should form a hill of their own to the right; two hills on top of "
            "each other mean that images and captions are unaligned.",
        ),
        (
            "Recall on held-out pairs",
            draw_recall(lines),
            "Both directions should rise together; a fall while the loss still sinks is "
            "overfitting.",
        ),
        (
            "Gradient norms",
            draw_gradient_norms(lines),
            "The towers should stay within about a factor of ten of each other; a line that drops "
            "away is a tower that no longer learns.",
        ),
        (
            "Health of the embedding space",
            draw_health(lines),
            "Look for a side that departs from the other or runs to an extreme: spread or rank "
            "that goes to nothing is collapse.",
        ),
        (
            "Learning rate and logit scale",
            draw_schedule(lines),
            "The scale should move slowly and settle below its limit; one that sits at the limit "
            "is saturated.",
        ),
    ]
    return [
        {"title": title, "source": source, "caption": caption, "wide": title in WIDE_PICTURES}
        for title, source, caption in drawn
        if source is not None
    ]


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not JSON ({error}); write it again or remove it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object; write it again or remove it")
    return content


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested evidence as one row a figure."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}: ")
        else:
            yield name, _in_words(value)


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
