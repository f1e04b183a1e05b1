"""A trained model from the folder of a run or checkpoint; `mmscale.load`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.resume import open_trained
from mmscale.config.load import overridden, stage_config
from mmscale.config.model import ModelConfig
from mmscale.config.paths import path_of
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.data.caption_text import with_cleaning
from mmscale.data.pixels import EvalTransform, in_rgb, normalise
from mmscale.engine.ema import averaged
from mmscale.engine.inference import Inference
from mmscale.errors import printable
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import DualEncoder, Tokenizer
from mmscale.model.freezing import select
from mmscale.model.hub import fetching_only
from mmscale.model.kept import kept_towers, opened_lines
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import choose


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be called by one process."""

    config: Config
    model: TwoTower
    spec: InputSpec
    inference: Inference
    checkpoint: Checkpoint


def load_trained(
    path: Path, words: Sequence[str] = (), check: Callable[[Config], None] | None = None
) -> Trained:
    """The model of a run or checkpoint.

    Args:
        path: The run or checkpoint.
        words: `key=value`: where what it names lies now (`config.load.overridden`).
        check: Refuses a configuration before its model is built.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    checkpoint = open_trained(path)
    run, stage = overridden(checkpoint.config, words), checkpoint.state.stage
    config = stage_config(run, stage)
    config = config.model_copy(update={"model": _kept(checkpoint, config.model)})
    if check is not None:
        check(config)
    named = {str(config.model.vision.name), str(config.model.text.name)}
    with fetching_only(named - _names(checkpoint.config.model)):
        model, spec = build_model(config.model, config.data.image_size, config.run.seed, fill=False)
    select(model, run, stage)
    spec = with_cleaning(spec, config.data.caption_cleaning)
    checkpoint.load_weights(model)
    if config.eval.weights == "ema":
        checkpoint.load_momentum(averaged(model, model))
    return Trained(config, model, spec, Inference(model, choose(config.engine)), checkpoint)


def _kept(checkpoint: Checkpoint, model: ModelConfig) -> ModelConfig:
    """The model, its towers read from the checkpoint as far as that keeps them."""
    stored = checkpoint.config.model
    kept = kept_towers(model, stored, checkpoint.folder, checkpoint.files)
    for line in opened_lines(model, stored, kept):
        sys.stderr.write(f"mmscale: {printable(line)}\n")
    return kept


def _names(model: ModelConfig) -> set[str]:
    return {str(model.vision.name), str(model.text.name)}


def load(
    path: str | Path, *words: str
) -> tuple[DualEncoder, Callable[[Image.Image], Tensor], Tokenizer]:
    """The model of a run or checkpoint on its device, its evaluation transform and tokenizer.

    Args:
        path: The run or checkpoint.
        words: `key=value`, where a tower that the run names lies elsewhere now:
            `model.text.name=hf:FOLDER`, or where it shall run: `engine.device=cpu`.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    trained = load_trained(Path(path_of(str(path), str(path))), words)
    model = DualEncoder(trained.model, trained.spec.pad_token)
    return model, Transform(trained.spec), Tokenizer(trained.spec)


def load_on_cpu(
    path: Path, words: Sequence[str] = (), check: Callable[[Config], None] | None = None
) -> tuple[Config, DualEncoder, InputSpec]:
    """The model of a run or checkpoint in fp32, with the run's configuration; as `load_trained`.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    trained = load_trained(path, words, check)
    return (
        trained.config,
        DualEncoder(trained.model.cpu().float(), trained.spec.pad_token),
        trained.spec,
    )


class Transform:
    """A photograph to the pixels that the model was evaluated with."""

    def __init__(self, spec: InputSpec):
        self._spec = spec
        self._crop = EvalTransform(spec)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """Its pixels, normalised.

        Raises:
            DataError: Its mode says nothing of its range.
        """
        upright = in_rgb(ImageOps.exif_transpose(image))
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
        return normalise(self._crop(pixels)[None], self._spec)[0]
