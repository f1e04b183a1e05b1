"""`mmscale.load`: a trained run as a model, a transform and a tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from mmscale.config.paths import path_of
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.data.decode import in_rgb
from mmscale.data.transform import EvalTransform, normalise
from mmscale.evaluation import load_trained
from mmscale.model.dual_encoder import DualEncoder, Tokenizer


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
