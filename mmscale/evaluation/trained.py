"""A model to be called: that of a run or checkpoint, or anybody's by its name; `mmscale.load`."""

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
from mmscale.checkpoint.state import STATE
from mmscale.config.load import overridden, stage_config, validate
from mmscale.config.model import ModelConfig
from mmscale.config.paths import path_of
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.data.caption_text import with_cleaning
from mmscale.data.pixels import EvalTransform, in_rgb, normalise
from mmscale.engine.ema import averaged
from mmscale.engine.inference import Inference
from mmscale.errors import ConfigError, printable
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import DualEncoder, Tokenizer
from mmscale.model.freezing import select
from mmscale.model.hub import fetching_only
from mmscale.model.kept import kept_towers, opened_lines
from mmscale.model.presets import HF, OPENCLIP, fill_preset
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import choose

_FORMS = (
    "a run, a checkpoint, an export for OpenCLIP or Hugging Face, openclip:NAME[@WEIGHTS] or "
    "hf:NAME_OR_PATH"
)
# A model that is only looked at keeps its scale, whatever it is.
_LARGEST_SCALE = 1e6


@dataclass(frozen=True)
class Loaded:
    """A model, ready to be called by one process, and the settings that it is called with."""

    config: Config
    model: TwoTower
    spec: InputSpec
    inference: Inference


@dataclass(frozen=True)
class Trained(Loaded):
    """One of a run of ours."""

    checkpoint: Checkpoint


def load_named(name: str, words: Sequence[str] = ()) -> Loaded:
    """A model by whatever a user calls it; `Trained` where it is of a run of ours.

    Args:
        name: A run or checkpoint, a folder that OpenCLIP or Hugging Face reads, such as an export,
            `openclip:NAME`, `openclip:NAME@WEIGHTS` (a tag or a file), or `hf:NAME_OR_PATH`.
        words: `key=value`: where what it names lies now, and how it is run.

    Raises:
        CheckpointError: Its weights are missing or damaged.
        ConfigError: There is no such model, or a word would make it another.
    """
    if name.startswith((OPENCLIP, HF)):
        return _load_foreign(*_preset_and_weights(name), words)
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"{name}: no such run or checkpoint; name {_FORMS}")
    if not (path / STATE).exists() and not (path / "checkpoints").is_dir():
        if (path / "open_clip_config.json").is_file():
            return _load_foreign(f"{OPENCLIP}local-dir:{path}", "pretrained", words)
        if (path / "config.json").is_file():
            return _load_foreign(f"{HF}{path}", "pretrained", words)
    return load_trained(path, words)


def _preset_and_weights(name: str) -> tuple[str, str]:
    """`model.preset` and `model.weights`."""
    preset, at, weights = name.rpartition("@")
    # A path may have the sign in it too.
    is_folder = Path(name.split(":", 2)[-1]).is_dir()
    if not name.startswith(OPENCLIP) or not at or is_folder:
        return name, "pretrained"
    return preset, weights


def _load_foreign(preset: str, weights: str, words: Sequence[str]) -> Loaded:
    """A model of others, as it is, with the defaults of all settings."""
    model = {"preset": preset, "weights": weights, "logit_scale": {"max": _LARGEST_SCALE}}
    try:
        defaults = validate({"data": {"train": "none"}, "model": model})
        filled = defaults.model_copy(update={"model": fill_preset(defaults.model)})
        config = overridden(filled, words)
        built, spec = build_model(config.model, config.data.image_size, config.run.seed)
    except ConfigError as error:
        hint = "" if not _lacks_weights(preset, weights) else f"; name them: {preset}@WEIGHTS"
        raise ConfigError(f"{error}{hint}") from error
    spec = with_cleaning(spec, config.data.caption_cleaning)
    return Loaded(config, built, spec, Inference(built, choose(config.engine)))


def _lacks_weights(preset: str, weights: str) -> bool:
    is_built_in = preset.startswith(OPENCLIP) and preset.count(":") == 1
    return is_built_in and weights == "pretrained"


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
    """A model on its device, its evaluation transform and tokenizer.

    Args:
        path: A run, a checkpoint, or another model by the names that `load_named` takes.
        words: `key=value`, where a tower that the run names lies elsewhere now:
            `model.text.name=hf:FOLDER`, or where it shall run: `engine.device=cpu`.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    loaded = load_named(path_of(str(path), str(path)), words)
    model = DualEncoder(loaded.model, loaded.spec.pad_token)
    return model, Transform(loaded.spec), Tokenizer(loaded.spec)


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
