"""Every set that a run is evaluated on, one after the other, by the same code."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmscale.config.evaluation import MAIN, EvalSetConfig, logged, setting_of
from mmscale.config.load import read_yaml, validate
from mmscale.config.schema import Config
from mmscale.contracts import Peers
from mmscale.data.grouping import copies_line
from mmscale.data.shards import open_stored
from mmscale.diagnostics.pairs import Pairs
from mmscale.engine.encode import Call, Encoder
from mmscale.errors import ConfigError, DataError
from mmscale.evaluation.classes import ClassSet, class_figures, classify, open_classes
from mmscale.evaluation.encoded import EvalSet, HeldOut, open_sets
from mmscale.evaluation.retrieval import embed_set, evaluate
from mmscale.evaluation.trained import Loaded
from mmscale.parallel.peers import Alone


@dataclass(frozen=True)
class Evaluated:
    """What was found on a set: its figures by name; of pairs, their embeddings."""

    figures: dict[str, float]
    pairs: Pairs | None = None


def evaluate_sets(
    config: Config,
    call: Call,
    device: torch.device,
    sets: Mapping[str, EvalSet],
    peers: Peers,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Evaluated]:
    """Each set's figures, the same on every rank. Collective.

    Args:
        config: The run.
        call: Forward of a model in evaluation mode.
        device: Where it computes.
        sets: By name, in the order in which they are evaluated.
        peers: All ranks.
        progress: Called as a set's images are encoded, with how many and of how many.

    Raises:
        DataError: A set is not what its manifest says, or too much of it cannot be decoded.
        HaltError: The embeddings are not finite.
    """
    found = {}
    for name, held_out in sets.items():
        try:
            if isinstance(held_out, ClassSet):
                encoder = Encoder.of(config, call, device, held_out.spec, peers)
                taken = classify(encoder, held_out, progress)
                count = len(held_out.classes)
                found[name] = Evaluated(class_figures(taken, count, peers))
            else:
                found[name] = Evaluated(*evaluate(config, call, device, held_out, peers, progress))
        except DataError as error:
            is_told = name == MAIN or str(error).startswith("eval.sets.")
            raise (error if is_told else DataError(f"{setting_of(name)}: {error}")) from error
    return found


def as_logged(evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
    """The figures of all sets as they are logged: `eval/mean`, `eval/coco/mean`."""
    return {
        logged(name, figure): value
        for name, found in evaluated.items()
        for figure, value in found.figures.items()
    }


def read_sets(path: Path) -> dict[str, EvalSetConfig]:
    """Sets that a file names, in YAML or JSON, as `eval.sets` does.

    Raises:
        ConfigError: It cannot be read, or names none.
    """
    return sets_of(str(path), read_yaml(path))


def sets_of(path: str, content: Mapping[str, Any]) -> dict[str, EvalSetConfig]:
    """Sets by name, as `eval.sets` has them; `path`: where they stand.

    Raises:
        ConfigError: One of them is wrong, or there is none.
    """
    try:
        sets = validate({"data": {"train": "none"}, "eval": {"sets": dict(content)}}).eval.sets
    except ConfigError as error:
        raise ConfigError(
            "\n".join(f"{path}: {line}" for line in str(error).split("\n"))
        ) from error
    if not sets:
        raise ConfigError(f"{path}: names no set; write NAME: {{data: SHARDS}}")
    return sets


def evaluate_model(loaded: Loaded, sets: Mapping[str, EvalSetConfig]) -> dict[str, Evaluated]:
    """What a model finds on sets, by one process.

    Raises:
        DataError: A set cannot be used.
    """
    return evaluate_opened(loaded, open_named(loaded, sets))


def evaluate_opened(loaded: Loaded, sets: Mapping[str, EvalSet]) -> dict[str, Evaluated]:
    """As `evaluate_model`, of sets that are open."""
    inference = loaded.inference
    return evaluate_sets(loaded.config, inference.call, inference.device, sets, Alone())


def open_named(loaded: Loaded, sets: Mapping[str, EvalSetConfig]) -> dict[str, EvalSet]:
    """Sets as a model is fed, whatever its own run is evaluated on and has cached.

    Raises:
        DataError: A set cannot be used.
    """
    config = loaded.config
    chosen = config.model_copy(
        update={
            "data": config.data.model_copy(update={"eval": None, "feature_cache": None}),
            "eval": config.eval.model_copy(update={"sets": dict(sets)}),
        }
    )
    return open_sets(chosen, loaded.spec)


def open_own(loaded: Loaded) -> dict[str, EvalSet]:
    """The `eval.sets` of a model's run, where they are files of this machine.

    Raises:
        DataError: One is not, or cannot be used.
    """
    found: dict[str, EvalSet] = {}
    for name, chosen in loaded.config.eval.sets.items():
        if chosen.kind == "classes":
            found |= open_named(loaded, {name: chosen})
            continue
        shards = open_stored(chosen.data, loaded.config.data, setting_of(name))
        found[name] = HeldOut(shards, loaded.spec, None)
    return found


def embedded_sets(
    path: str, loaded: Loaded, sets: Mapping[str, EvalSetConfig], tell: Callable[[str], None]
) -> Iterator[tuple[str, Pairs]]:
    """Each set of pairs through a model, by name; labelled images, which have none, are told.

    Args:
        path: Where the sets stand.
        loaded: The model.
        sets: By name.
        tell: Takes a line for each set that is left out, and for copies in one.

    Raises:
        ConfigError: None is of pairs.
        DataError: A set cannot be used.
    """
    chosen = {name: each for name, each in sets.items() if each.kind == "retrieval"}
    if not chosen:
        raise ConfigError(f"{path}: has labelled images alone; name a set of images and captions")
    for name in (name for name in sets if name not in chosen):
        tell(f"{name}: is left out: labelled images have no captions to be paired with")
    for name, held_out in open_named(loaded, chosen).items():
        assert isinstance(held_out, HeldOut), "of kind retrieval"
        if line := copies_line(name, held_out.shards.copies, held_out.shards.samples):
            tell(line)
        yield name, embed_set(loaded, held_out.shards, Alone())


def classify_set(loaded: Loaded, data: str, classes: str) -> dict[str, float]:
    """Zero-shot accuracies of a model on what `--data` and `--classes` name.

    Raises:
        DataError: The images or the classes cannot be used.
    """
    chosen = EvalSetConfig(data=data, kind="classes", classes=classes)
    opened = open_classes("--", chosen, loaded.spec, keeps=False)
    inference = loaded.inference
    encoder = Encoder.of(loaded.config, inference.call, inference.device, loaded.spec, Alone())
    return class_figures(classify(encoder, opened), len(opened.classes), Alone())
