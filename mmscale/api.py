"""What Python code calls: `mmscale.train`, `mmscale.evaluate`, `mmscale.diagnose`.

Where the command exits with a code, these raise the errors of `mmscale.errors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmscale.config.load import load_config, with_words
from mmscale.config.paths import path_of
from mmscale.config.schema import Config
from mmscale.data.shards import open_held_out
from mmscale.diagnostics.doctor import Diagnosis
from mmscale.diagnostics.of_run import diagnose_alone
from mmscale.diagnostics.pairs import pairs_of
from mmscale.errors import ConfigError, InterruptError
from mmscale.evaluation.retrieval import evaluate_set
from mmscale.evaluation.sets import classify_set, evaluate_model, read_sets, sets_of
from mmscale.evaluation.trained import load, load_named
from mmscale.parallel.peers import Alone
from mmscale.parallel.signals import heeding_signals
from mmscale.report.metrics import read_metrics
from mmscale.train import run


@dataclass(frozen=True)
class TrainedRun:
    """A run that has come to its end.

    Attributes:
        folder: `run.dir`, with its checkpoints and `report.html`.
        metrics: The lines of `metrics.jsonl`.
    """

    folder: Path
    metrics: list[dict[str, Any]]

    @property
    def figures(self) -> dict[str, float]:
        """Of the last evaluation: `i2t_r1`, `coco/t2i_r10`; empty where nothing was held out."""
        lines = [line for line in self.metrics if any(name.startswith("eval/") for name in line)]
        last = lines[-1] if lines else {}
        return {
            name.removeprefix("eval/"): value
            for name, value in last.items()
            if name.startswith("eval/")
        }

    def load(self, *words: str) -> Any:
        """Its model, evaluation transform and tokenizer, as of `mmscale.load`."""
        return load(self.folder, *words)


def train(
    config: Config | Mapping[str, Any] | str | PathLike[str] | Sequence[str | PathLike[str]],
    *words: str,
) -> TrainedRun:
    """Train in this process, to the end; a run that is there already goes on.

    Args:
        config: A preset, a YAML file, a list of both and of `key=value`, settings as a nested
            mapping, or a `Config`.
        words: `key=value`, such as `optim.lr=1e-3`; they win.

    Returns:
        The run. Other ranks, where a launcher started several, get the same.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The data is missing or damaged.
        CheckpointError: What it goes on or begins from cannot be used.
        HaltError: Its guard halted it, its loss diverged, or gradients were not finite.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    if isinstance(config, Config):
        chosen = with_words(config, words)
    elif isinstance(config, (Mapping, str)):
        chosen = load_config([config, *words])
    else:
        named = [config] if isinstance(config, PathLike) else config
        chosen = load_config([*(fspath(each) for each in named), *words])
    try:
        heeding_signals(lambda: run(chosen), within=lambda command: command())
    except InterruptError as error:
        raise KeyboardInterrupt(str(error)) from error
    folder = Path(chosen.run.dir)
    return TrainedRun(folder, read_metrics(folder / "metrics.jsonl"))


def evaluate(
    model: str | PathLike[str],
    data: str | PathLike[str] | None = None,
    *words: str,
    sets: str | PathLike[str] | Mapping[str, Any] | None = None,
    classes: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Recall on held-out pairs by Karpathy's protocol, or zero-shot accuracy.

    Args:
        model: A run, checkpoint or export, `openclip:NAME@WEIGHTS` or `hf:NAME_OR_PATH`.
        data: Packed folder or shards; default a run's own `data.eval`.
        words: `key=value`: where what a run names lies now, or `engine.device=cpu`.
        sets: Several sets by name, as in `eval.sets`, or a YAML file of such.
        classes: A file of classes, or `imagenet`: the images of `data` are classified.

    Returns:
        `i2t_r1` to `t2i_r10` in percent, `images`, `captions`; with `classes` `top1`, `top5` and
        `mean_per_class`; with `sets` such figures by set.

    Raises:
        ConfigError: There is no such model, or nothing to evaluate it on.
        DataError: The pairs or classes cannot be used.
        CheckpointError: The model's weights cannot be used.
    """
    loaded = load_named(fspath(model), words)
    if sets is not None:
        if data is not None or classes is not None:
            raise ConfigError("evaluate: sets name their own data and classes; leave those out")
        chosen = sets_of("sets", sets) if isinstance(sets, Mapping) else read_sets(Path(sets))
        return {name: found.figures for name, found in evaluate_model(loaded, chosen).items()}
    stored = loaded.config.data
    named = None if data is None else path_of("data", fspath(data))
    if named is None and stored.eval is None:
        raise ConfigError(f"evaluate {fspath(model)}: name the held-out pairs with data=SHARDS")
    if classes is not None:
        return classify_set(loaded, str(named or stored.eval), fspath(classes))
    shards = open_held_out("data", named, stored)
    assert shards is not None, "one is named"
    return evaluate_set(loaded, shards, Alone())


def diagnose(
    image: Any,
    text: Any,
    *,
    image_ids: Any = None,
    text_ids: Any = None,
    backbone_image: Any = None,
    backbone_text: Any = None,
    logit_scale: Any = None,
) -> Diagnosis:
    """What is wrong with an embedding space: anybody's, in the middle of any training.

    Args:
        image: Embeddings of images, [n d], as a tensor or an array of floats.
        text: Embeddings of captions, [m d]; row i belongs to row i of `image` unless ids say more.
        image_ids: An integer or text for each image row.
        text_ids: The image that each caption row belongs to.
        backbone_image: What the image tower gave before its projection, [n f]; with the other
            side's, shuffled pairs are told from towers that never met.
        backbone_text: What the text tower gave before its projection, [m g].
        logit_scale: 1 / temperature, where it is learnt.

    Returns:
        The verdict with its evidence, causes and what helps, in words.

    Raises:
        DataError: Rows are not finite, are zeros, or do not fit together.
    """
    given = {
        "image": image,
        "text": text,
        "image_ids": image_ids,
        "text_ids": text_ids,
        "backbone_image": backbone_image,
        "backbone_text": backbone_text,
        "logit_scale": logit_scale,
    }
    arrays = {name: _array(value) for name, value in given.items() if value is not None}
    return diagnose_alone(pairs_of("diagnose", arrays))


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # numpy has no bf16.
        value = (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)
