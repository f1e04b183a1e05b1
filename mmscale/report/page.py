"""A run's HTML page: one file that opens from disk, with everything it shows inside it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config.load import read_yaml
from mmscale.errors import ConfigError
from mmscale.report.examples import Examples
from mmscale.report.facts import collect_facts, collect_recalls
from mmscale.report.health import draw_health
from mmscale.report.maps import NAMES, SIZE, draw_maps
from mmscale.report.metrics import read_metrics
from mmscale.report.pictures import Picture, space_pictures, training_pictures
from mmscale.report.space import SPACE_NAME, read_space
from mmscale.report.template import write_html
from mmscale.report.verdicts import describe, read_doctor, told

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class Page:
    """A page that was written, and what it shows.

    Attributes:
        path: The file.
        pictures: Those drawn from figures.
        examples: Photographs and captions.
    """

    path: Path
    pictures: list[Picture]
    examples: Examples


def write_page(run_dir: Path, layout: str | None = None) -> Page:
    """Write `report.html` from what the run folder holds; only `metrics.jsonl` must be there.

    Args:
        run_dir: The folder.
        layout: How maps are drawn; default the run's `log.map`.

    Raises:
        DataError: A file of the folder is missing or cannot be read.
        ConfigError: `config.yaml` cannot be read, or the maps' library is not installed.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    config_path = run_dir / "config.yaml"
    settings = read_yaml(config_path) if config_path.exists() else {}
    doctor = read_doctor(run_dir / "doctor.json")
    moments, examples = read_space(run_dir / SPACE_NAME), Examples.read(run_dir)
    layout = layout or _layout(settings, config_path)
    training, space = training_pictures(lines), space_pictures(moments)
    health = [Picture(title, source) for title, source in draw_health(lines).items()]
    page = run_dir / REPORT_NAME
    write_html(
        page,
        "page.html",
        title=run_dir.resolve().name,
        verdict=told(doctor),
        also=[describe(name) for name in doctor["also"]],
        confidence=_share(doctor["confidence"]),
        evidence=dict(_flatten(doctor["evidence"])),
        causes=doctor["causes"],
        remedies=doctor["remedies"],
        recalls=collect_recalls(lines),
        training=training,
        space=space,
        maps=draw_maps(moments, examples, layout),
        map_name=NAMES[layout],
        map_size=SIZE,
        examples=examples,
        health=health,
        facts=collect_facts(lines),
        config_text=config_path.read_text("utf-8") if settings else None,
    )
    return Page(page, [*training, *space, *health], examples)


def _layout(settings: Mapping[str, Any], path: Path) -> str:
    """The run's `log.map`; its file may be another version's, or another's."""
    log = settings.get("log")
    name = log.get("map", "pca") if isinstance(log, Mapping) else "pca"
    if not isinstance(name, str) or name not in NAMES:
        raise ConfigError(
            f"{path}: log.map is {name!r}, which draws no map; choose {', '.join(NAMES)}"
        )
    return name


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
