"""the study `recipe`: what each part of a recipe adds to held-out recall, and what it costs.

The recipe has two stages, heads on kept features and then towers. Of the rows, those up to the
recipe itself each add a part to the row before, from plain heads on (layer-wise decay, if the
recipe has none, is tried and left again); every later one adds one part to the recipe. Towers see
as many pairs in each. Meant for the `flickr8k_finetune` preset; what rows differ in is said here.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmscale.config.load import effective, load_config
from mmscale.config.rules import merged
from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.report.metrics import MEAN_RECALL
from tools.studies.cells import Cell, Result
from tools.studies.experiments import with_defaults
from tools.studies.table import Table, Value, table_of

DEFAULTS = ("eval.every=null", "checkpoint.every=null")
INFONCE: dict[str, Any] = {"kind": "infonce"}
ALIKE = ("optim.layer_decay.vision=1", "optim.layer_decay.text=1")
DECAYED = ("optim.layer_decay.vision=0.9", "optim.layer_decay.text=0.8")
DRAWN = ("model.head.init=normal",)
NO_DROPOUT = ("model.head.dropout=0",)
# Drawn heads have further to go than those that start from a closed form.
DRAWN_HEADS: dict[str, Any] = {"lr": 1e-3}
DRAWN_BESIDE_TOWERS: dict[str, Any] = {"lr_scale": {"head": 1.0}}
LARGE = 1024
# What is added to the recipe, one at a time.
PARTS: dict[str, tuple[str, ...]] = {
    "+ queue": ("negatives.queue.size=4096",),
    "+ hard negatives": (
        "negatives.mining.kind=hard",
        'negatives.mining.strength={from: 0, to: 1, over: "2 epochs"}',
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
    """Every row, seed by seed: a grid that is cut short has every row.

    Raises:
        ConfigError: The recipe has not two stages.
    """
    words = with_defaults(words, DEFAULTS)
    rows = dict(_rows(load_config(words)))
    return [
        Cell({"recipe": name, "seed": seed}, effective((*words, *extra, f"run.seed={seed}")))
        for seed in seeds
        for name, extra in rows.items()
    ]


def _rows(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    if len(config.stages) != 2:
        raise ConfigError(
            f"study recipe: the recipe has {len(config.stages)} stages; give it two, one for heads "
            "on kept features and one for towers, as the preset flickr8k_finetune does"
        )
    heads, towers = (
        stage.model_dump(mode="json", exclude_defaults=True) for stage in config.stages
    )
    drawn = _changed(heads, DRAWN_HEADS)
    # Towers that train have no features to keep.
    at_once = (
        _stages(_changed(towers, DRAWN_BESIDE_TOWERS)),
        f"train.duration={towers['duration']}",
        "data.feature_cache=null",
    )
    rates = config.optim.layer_decay
    decayed = DECAYED if rates.vision == rates.text == 1 else ()
    alone = _stages({**drawn, "duration": str(config.train.duration)})
    yield "heads only", (*DRAWN, *NO_DROPOUT, alone)
    yield "+ fine-tune", (*DRAWN, *NO_DROPOUT, *ALIKE, *at_once)
    yield "+ layer-wise decay", (*DRAWN, *NO_DROPOUT, *decayed, *at_once)
    yield "+ stages", (*DRAWN, *NO_DROPOUT, _stages(drawn, towers))
    yield "+ canonical heads", NO_DROPOUT
    yield "+ dropout", ()
    chunk = config.stages[1].global_batch_size or config.train.global_batch_size
    chunked = {**towers, "global_batch_size": LARGE, "micro_batch_size": chunk}
    yield "+ chunked batch 1,024", (_stages(heads, chunked),)
    yield from PARTS.items()
    for name, terms in TERMS.items():
        yield f"+ {name}", (f"loss.terms={json.dumps(terms)}",)


def _changed(stage: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
    return {**stage, "optim": merged(stage.get("optim", {}), optim)}


def _stages(*stages: dict[str, Any]) -> str:
    return f"stages={json.dumps(stages)}"


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
