"""the study `losses`: held-out recall by loss and by negatives, at equal steps.

Meant for frozen towers with cached features (the `flickr8k` preset), where a run takes seconds.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mmscale.config.load import load_config
from mmscale.data.shards import open_train
from mmscale.errors import ConfigError
from mmscale.report.metrics import MEAN_RECALL, RECALLS
from tools.studies.cells import Cell, Figures, Result
from tools.studies.experiments import with_defaults
from tools.studies.table import Table, table_of
from tools.studies.trained import trained

DEFAULTS = ("train.duration=150 steps", "eval.every=null", "checkpoint.every=null")
BATCH = "batch"
INFONCE: dict[str, Any] = {"kind": "infonce"}
# Terms that do not contrast, and those that only shape the space, stand beside InfoNCE.
LOSSES: dict[str, list[dict[str, Any]]] = {
    "infonce": [INFONCE],
    "siglip": [{"kind": "siglip"}],
    "dcl": [{"kind": "dcl", "temperature": 0.07}],
    "hn_nce": [{"kind": "hn_nce"}],
    "ntxent": [{"kind": "ntxent"}],
    "supcon": [{"kind": "supcon"}],
    "hinge, all": [{"kind": "hinge", "hardness": 0}],
    "hinge, hardest": [{"kind": "hinge"}],
    "spectral": [{"kind": "spectral"}],
    "vicreg": [{"kind": "vicreg"}],
    "barlow": [{"kind": "barlow"}],
    "alignment + uniformity": [{"kind": "alignment"}, {"kind": "uniformity"}],
    "distillation": [{"kind": "distillation"}],
    "infonce + prototypes": [INFONCE, {"kind": "prototypes", "weight": 0.5}],
    "infonce + vicreg": [INFONCE, {"kind": "vicreg", "weight": 0.04}],
    "infonce + decorrelation": [INFONCE, {"kind": "decorrelation", "weight": 0.2}],
    "infonce + diversity": [INFONCE, {"kind": "diversity", "weight": 0.1}],
    "infonce + regression": [INFONCE, {"kind": "regression", "weight": 0.5}],
}
HARD_BATCHES = "hard batches"
NEGATIVES: dict[str, tuple[str, ...]] = {
    "queue, momentum": ("negatives.queue.size=1024",),
    "queue, online": ("negatives.queue.size=1024", "negatives.queue.source=online"),
    "bank of all images": ("negatives.queue.size=all",),
    "hard": ("negatives.mining.kind=hard",),
    "semi_hard": ("negatives.mining.kind=semi_hard",),
    "hard, after 3 epochs": (
        "negatives.mining.kind=hard",
        'negatives.mining.strength={from: 0, to: 1, over: "3 epochs"}',
    ),
    HARD_BATCHES: (),
}
# What is tried with each kind of negatives.
CONTRASTED = ("infonce", "siglip")
COLUMNS = {
    "image to text R@1": "eval/i2t_r1",
    "R@5": "eval/i2t_r5",
    "R@10": "eval/i2t_r10",
    "text to image R@1": "eval/t2i_r1",
    "R@5 ": "eval/t2i_r5",
    "R@10 ": "eval/t2i_r10",
    "mean": MEAN_RECALL,
}
assert set(RECALLS) < set(COLUMNS.values())


def cells(words: tuple[str, ...], seeds: Iterable[int]) -> list[Cell]:
    """Every loss with the batch's negatives, then some with every other kind of negatives."""
    words = with_defaults(words, DEFAULTS)
    places: list[tuple[str, str, tuple[str, ...]]] = [(loss, BATCH, ()) for loss in LOSSES]
    places += [
        (loss, negatives, extra) for negatives, extra in NEGATIVES.items() for loss in CONTRASTED
    ]
    return [
        Cell(
            {"loss": loss, "negatives": negatives, "seed": seed},
            (*words, *extra, f"loss.terms={json.dumps(LOSSES[loss])}", f"run.seed={seed}"),
        )
        # Whole tables of one seed after another: a grid that is cut short has every row.
        for seed in seeds
        for loss, negatives, extra in places
    ]


def measure(cell: Cell, folder: Path) -> Figures:
    """Train; images that look alike in the cached features make the hard batches."""
    words = cell.words
    if cell.labels["negatives"] == HARD_BATCHES:
        words = (*words, f"data.hard_batches.table={_training_features(words)}")
    return trained(Cell(cell.labels, words), folder)


def _training_features(words: Sequence[str]) -> Path:
    """The table of the training set in the feature cache that the runs share."""
    data = load_config(words).data
    images = open_train(data).samples
    kept = [] if data.feature_cache is None else Path(data.feature_cache).glob("*.safetensors")
    for path in sorted(kept):
        with safe_open(path, "pt") as file:
            if file.get_slice("image_ids").get_shape() == [images]:
                return path
    raise ConfigError(
        f"data.feature_cache={data.feature_cache} has no features of the {images:,} images of "
        "data.train to find hard batches with; name the folder of a run with frozen towers"
    )


def page(results: Sequence[Result]) -> str:
    """Both tables."""
    updates = sorted({result.figures["step"] for result in results if "step" in result.figures})
    seeds = len({result.labels["seed"] for result in results})
    return (
        "# Losses and negatives at equal steps\n\n"
        "Written by `python -m tools.studies losses CONFIG key=value ... --page FILE`: held-out "
        "recall in "
        f"percent after {' or '.join(map(str, updates))} updates, mean ± standard deviation over "
        f"{seeds} seeds. Terms that do not contrast, or only shape the space, stand beside "
        "InfoNCE.\n\n"
        f"{losses_table(results).markdown()}\n\n"
        "## Negatives\n\n"
        "Mean of the six recalls. `batch`: the other pairs of the global batch; the queue holds "
        "1,024 rows, `hard` and `semi_hard` mine a tenth of the negatives, hard batches bring in "
        "images that look alike.\n\n"
        f"{negatives_table(results).markdown()}\n"
    )


def losses_table(results: Sequence[Result]) -> Table:
    """Recalls by loss, with the batch's negatives."""
    return table_of(
        (
            (result.labels["loss"], column, result.figures.get(name, "failed"))
            for result in results
            if result.labels["negatives"] == BATCH
            for column, name in COLUMNS.items()
        ),
        "loss",
    )


def negatives_table(results: Sequence[Result]) -> Table:
    """Mean recall by negatives and loss."""
    return table_of(
        (
            (labels["negatives"], labels["loss"], result.figures.get(MEAN_RECALL, "failed"))
            for result in results
            if (labels := result.labels)["loss"] in CONTRASTED
        ),
        "negatives",
    )
