"""the study `collapse`: every failure made on purpose, against every remedy.

A run trains heads on given features and takes seconds. Without a preset or file among the words the
features are drawn; with the words of a run that has a feature cache (`flickr8k`), they are its own.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from mmscale.config.load import flatten, load_config
from mmscale.config.schema import Config
from mmscale.diagnostics.doctor import STILL, InTraining, diagnose
from mmscale.diagnostics.geometry import PREFIX, health_figures
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import recalls
from mmscale.parallel.peers import Alone
from tools.studies.cells import Cell, Figures
from tools.studies.collapse_data import features_of, names_a_run
from tools.studies.collapse_faults import FAULTS, dealt_anew
from tools.studies.collapse_page import page
from tools.studies.collapse_remedies import REMEDIES
from tools.studies.experiments import with_defaults
from tools.studies.given import Features, Model, without_data

__all__ = ["cells", "measure", "page"]

STEPS = 120
DEFAULTS = (
    "train.global_batch_size=128",
    "optim.lr=0.003",
    "optim.warmup=20 steps",
    "model.embed_dim=128",
    "engine.device=cpu",
)
# Training pairs that are compared with as many held-out ones.
SEEN = 500


def cells(words: tuple[str, ...], seeds: Iterable[int]) -> list[Cell]:
    """Each failure with each remedy."""
    return [
        Cell(
            {"failure": fault, "remedy": remedy, "seed": seed},
            _words(words, fault, remedy, seed),
        )
        for seed in seeds
        for fault in FAULTS
        for remedy in REMEDIES
    ]


def _words(given: tuple[str, ...], fault: str, remedy: str, seed: int) -> tuple[str, ...]:
    """A run's words, with the objective and the rate written out where the remedy changes them."""
    words = (*with_defaults(given, DEFAULTS), *FAULTS[fault].words, f"run.seed={seed}")
    for word in REMEDIES[remedy]:
        if word.startswith("+"):
            terms = [term.model_dump(mode="json") for term in _settings(words).loss.terms]
            words = (*words, f"loss.terms={json.dumps([*terms, json.loads(word[1:])])}")
        elif "/=" in word:
            key, by = word.split("/=")
            words = (*words, f"{key}={flatten(_settings(words))[key] / float(by):g}")
        else:
            words = (*words, word)
    return words


def _settings(words: Sequence[str]) -> Config:
    return load_config(words) if names_a_run(words) else without_data(words)


def measure(cell: Cell, folder: Path) -> Figures:
    """Train heads under a failure and a remedy; held-out recall, figures and verdict."""
    config, fault = _settings(cell.words), FAULTS[cell.labels["failure"]]
    # What is the same for all cells, so that features are read once.
    data = tuple(word for word in cell.words if _is_of_data(word))
    clean, seed = features_of(data, fault.captions), config.run.seed
    train, held_out = fault.train(clean[0], seed), fault.held_out(clean[1], seed)
    spoil = dealt_anew if fault.mixes_batches else _as_it_is
    model = Model(config, train, spoil)
    before = model.weights()
    model.train(STEPS)
    pairs = model.embed(held_out)
    seen = model.embed(spoil(train.rows(torch.arange(min(SEEN, len(train))))))
    after = model.weights()
    model.close()
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    return _figures(pairs, seen, still)


def _is_of_data(word: str) -> bool:
    key = word.partition("=")[0]
    return "=" not in word or key.startswith(("data.", "model.vision.", "model.text."))


def _as_it_is(batch: Features) -> Features:
    return batch


def _figures(pairs: Pairs, seen: Pairs, still: list[str]) -> Figures:
    health = health_figures(pairs)
    trained = health_figures(seen) | pairing_figures(seen)
    diagnosis = diagnose(pairs, InTraining.of({**trained, STILL: still}))
    scored = [value for name, value in recalls(pairs, Alone()).items() if "_r" in name]
    names = ("matched", "unmatched", "std_off_sqrt_d", "auc", "variance_image", "variance_text")
    return {
        "recall": sum(scored) / len(scored),
        "verdict": diagnosis.verdict,
        "also": list(diagnosis.also),
        "width": pairs.image.shape[1],
        "train_auc": trained[f"{PREFIX}auc"],
        **{name: health[f"{PREFIX}{name}"] for name in names},
    }
