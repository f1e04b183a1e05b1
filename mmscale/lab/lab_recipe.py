"""`mmscale lab recipe`: what each part of a recipe adds to held-out recall, and what it costs.

The first rows each add a part to the row before, every later one adds one part to `+ stages`; all
see as many pairs. Meant for the `flickr8k_finetune` preset; what rows differ in is said here.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mmscale.config.duration import Duration
from mmscale.config.load import load_config
from mmscale.lab.cells import Cell, Result
from mmscale.lab.experiments import with_defaults
from mmscale.lab.table import Table, Value, table_of
from mmscale.report.recalls import MEAN_RECALL

DEFAULTS = ("eval.every=null", "checkpoint.every=null")
HEADS: dict[str, Any] = {"name": "heads", "train": ["head", "scale"], "data": {"augment": "none"}}
INFONCE: dict[str, Any] = {"kind": "infonce"}
ALIKE = ("optim.layer_decay.vision=1", "optim.layer_decay.text=1")
# Towers that train have no features to keep.
AT_ONCE = ("stages=[]", "data.feature_cache=null")
# What is added to `+ stages`, one at a time.
PARTS: dict[str, tuple[str, ...]] = {
    "+ queue": ("negatives.queue.size=4096",),
    "+ chunked batch 1,024": ("train.global_batch_size=1024",),
    "+ hard negatives": (
        "negatives.mining.kind=hard",
        'negatives.mining.strength={from: 0, to: 1, over: "5 epochs"}',
    ),
}
TERMS: dict[str, list[dict[str, Any]]] = {
    "hn_nce": [{"kind": "hn_nce"}],
    "vicreg": [INFONCE, {"kind": "vicreg", "weight": 0.04}],
    "decorrelation": [INFONCE, {"kind": "decorrelation", "weight": 0.2}],
    "diversity": [INFONCE, {"kind": "diversity", "weight": 0.1}],
    "regression": [INFONCE, {"kind": "regression", "weight": 0.5}],
    "distillation": [INFONCE, {"kind": "distillation", "weight": 0.5}],
    "label smoothing": [INFONCE | {"label_smoothing": 0.1}],
}
COLUMNS = {
    "image to text R@1": "eval/i2t_r1",
    "text to image R@1": "eval/t2i_r1",
    "mean of the six": MEAN_RECALL,
}
MINUTES = "minutes"


def cells(words: tuple[str, ...], seeds: Iterable[int]) -> list[Cell]:
    """Every row, seed by seed: a grid that is cut short has every row."""
    words = with_defaults(words, DEFAULTS)
    rows = dict(_rows(load_config(words).train.duration))
    return [
        Cell({"recipe": name, "seed": seed}, (*words, *extra, f"run.seed={seed}"))
        for seed in seeds
        for name, extra in rows.items()
    ]


def _rows(duration: Duration) -> Iterator[tuple[str, tuple[str, ...]]]:
    half = str(replace(duration, amount=duration.amount / 2))
    alone = {**HEADS, "duration": str(duration)}
    then = [{**HEADS, "duration": half}, {"name": "all", "duration": half}]
    stages = (f"stages={json.dumps(then)}",)
    yield "heads only", (*ALIKE, f"stages={json.dumps([alone])}")
    yield "+ fine-tune", (*ALIKE, *AT_ONCE)
    yield "+ layer-wise decay", AT_ONCE
    yield "+ stages", stages
    for name, extra in PARTS.items():
        yield name, (*stages, *extra)
    for name, terms in TERMS.items():
        yield f"+ {name}", (*stages, f"loss.terms={json.dumps(terms)}")


def page(results: Sequence[Result]) -> str:
    """The table, and the words that differ from row to row."""
    first = {str(result.labels["recipe"]): result.words for result in results}
    common = set.intersection(*(set(words) for words in first.values()))
    lines = [
        f"- {name}: `{' '.join(word for word in words if _tells(word, common)) or '-'}`"
        for name, words in first.items()
    ]
    return (
        "Held-out recall in percent and minutes of a run, mean ± standard deviation over seeds.\n\n"
        f"{table(results).markdown()}\n\n" + "\n".join(lines) + "\n"
    )


def table(results: Sequence[Result]) -> Table:
    """Recalls and minutes by recipe."""

    def entries() -> Iterator[tuple[str, str, Value]]:
        for result in results:
            name = str(result.labels["recipe"])
            for column, figure in COLUMNS.items():
                yield name, column, result.figures.get(figure, "failed")
            yield name, MINUTES, result.seconds / 60

    return table_of(entries(), "recipe")


def _tells(word: str, common: set[str]) -> bool:
    return word not in common and not word.startswith("run.seed=")
