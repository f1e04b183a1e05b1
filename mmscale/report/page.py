"""A run's HTML page: one file that opens from disk, with everything it shows inside it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config.load import read_yaml
from mmscale.errors import ConfigError
from mmscale.report.examples import Examples
from mmscale.report.facts import collect_facts, collect_recalls, collect_sets
from mmscale.report.health import draw_health
from mmscale.report.maps import NAMES, SIZE, draw_maps
from mmscale.report.metrics import Lines, read_metrics
from mmscale.report.plots import (
    draw_balance,
    draw_gradient_norms,
    draw_loss,
    draw_recall,
    draw_schedule,
    draw_sets,
    draw_terms,
    draw_time,
)
from mmscale.report.retention import LINE_NAME, RetentionLine, draw_retention, read_line
from mmscale.report.space import (
    SPACE_NAME,
    Moments,
    draw_similarity,
    draw_similarity_over_time,
    draw_spectrum,
    read_space,
)
from mmscale.report.template import write_html
from mmscale.report.verdicts import read_doctor, told

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class Plot:
    """A picture as the page shows it.

    Attributes:
        title: Its name.
        source: The picture itself, as a `data:` URI.
        caption: What to look for.
        wide: Whether it takes the page's whole width.
    """

    title: str
    source: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Page:
    """A page that was written, and what it shows.

    Attributes:
        path: The file.
        pictures: Those drawn from figures.
        examples: Photographs and captions.
    """

    path: Path
    pictures: list[Plot]
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
    training = training_pictures(lines, read_line(run_dir / LINE_NAME))
    space = space_pictures(moments)
    health = [Plot(title, source) for title, source in draw_health(lines).items()]
    page = run_dir / REPORT_NAME
    write_html(
        page,
        "page.html",
        title=run_dir.resolve().name,
        told=told(doctor),
        recalls=collect_recalls(lines),
        sets=collect_sets(lines),
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


TIME = "Where the time goes"


def training_pictures(lines: Lines, line: RetentionLine | None = None) -> list[Plot]:
    """What could be drawn of the course of a run, and of the line between its ends."""
    drawn = [
        (
            "Loss",
            draw_loss(lines),
            "It should leave the chance line within the first tenth of the run and keep falling; "
            "a curve that hugs the line has learnt nothing about pairs.",
        ),
        (
            "Recall on held-out pairs",
            draw_recall(lines),
            "Both directions should rise together; a fall while the loss still sinks is "
            "overfitting.",
        ),
        (
            "Every evaluation set",
            draw_sets(lines),
            "A set that falls while the others rise is what the training forgets.",
        ),
        (
            "Gain and loss since the start",
            draw_retention(lines, line),
            "Up is better, right is worse. The dashed line leads from the first weights to the "
            "last: where it bends to the upper left, a blend forgets less than the run's end.",
        ),
        (
            "Gradient norms",
            draw_gradient_norms(lines),
            "A line that drops away from the others is a part that no longer learns; spikes of ten "
            "times the usual ask for a lower rate.",
        ),
        (
            "Gradient balance",
            draw_balance(lines),
            "Both towers should learn: outside the band one of them gets ten times the gradient "
            "of the other.",
        ),
        (
            "Terms of the loss",
            draw_terms(lines),
            "Each term should move from its chance value towards its floor; one that stays where "
            "it began adds nothing.",
        ),
        (
            "Learning rate and logit scale",
            draw_schedule(lines),
            "The scale should move slowly and settle below its limit; one that sits at the limit "
            "is saturated.",
        ),
        (
            TIME,
            draw_time(lines),
            "Forward and backward should fill most of an update; much data is too few "
            "data.workers, much communication too small a batch a rank. ZeRO's own exchanges stand "
            "in backward and optimizer.",
        ),
    ]
    return _those_drawn(drawn, wide=("Terms of the loss", "Learning rate and logit scale", TIME))


def space_pictures(moments: Moments) -> list[Plot]:
    """What could be drawn of the embedding space at the evaluations."""
    drawn = [
        (
            "Similarity of pairs",
            draw_similarity(moments),
            "The matched pairs should form a hill of their own to the right; two hills on top of "
            "each other mean that images and captions are unaligned.",
        ),
        (
            "Similarity over time",
            draw_similarity_over_time(moments),
            "From top to bottom the two hills should part. Hills that become needles beside each "
            "other are a space that collapses.",
        ),
        (
            "Covariance spectrum",
            draw_spectrum(moments),
            "Later curves should be flatter, or at least not lower: a curve that breaks off uses "
            "few directions, one that sinks as a whole is a space that contracts."
            if len(moments) > 1
            else "A curve that breaks off uses few directions.",
        ),
    ]
    return _those_drawn(drawn, wide=("Covariance spectrum",))


def _those_drawn(
    drawn: Iterable[tuple[str, str | None, str]], wide: tuple[str, ...] = ()
) -> list[Plot]:
    return [
        Plot(title, source, caption, title in wide)
        for title, source, caption in drawn
        if source is not None
    ]
