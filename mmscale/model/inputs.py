"""What each tower wants to be fed; together they make the `InputSpec` that `data` obeys."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mmscale.config.model import VisionConfig
from mmscale.contracts import InputSpec
from mmscale.errors import ConfigError
from mmscale.model.weights import MisfitError

Triple = tuple[float, float, float]
DEFAULT_CONTEXT = 77
# Names of tables with a row for each place of the picture.
_POSITIONS = re.compile(
    r"(pos(ition(al)?)?_(embed|bias)|relative_position)\S* (is \[|has another shape)"
)


@dataclass(frozen=True)
class ImageInput:
    """Side of the square in pixels, normalisation for pixels in [0, 1], and how it is resized."""

    image_size: int
    mean: Triple
    std: Triple
    interpolation: str = "bicubic"
    resize: str = "shortest"

    def override(self, config: VisionConfig) -> "ImageInput":
        """With `model.vision.mean` and `model.vision.std` where they are set."""
        mean = self.mean if config.mean is None else triple(config.mean)
        std = self.std if config.std is None else triple(config.std)
        return replace(self, mean=mean, std=std)


@dataclass(frozen=True)
class TextInput:
    """Tokenizer, its padding, the most tokens of a caption and what stands for unknown words."""

    tokenize: Callable[[Sequence[str]], list[list[int]]]
    pad_token: int
    context_length: int
    unknown_token: int | None = None


def triple(value: float | Sequence[float]) -> Triple:
    """One value for all channels, or one for each."""
    red, green, blue = [value] * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def join_inputs(image: ImageInput, text: TextInput) -> InputSpec:
    """Both towers' wishes as the record that `data` gets."""
    return InputSpec(
        image_size=image.image_size,
        mean=image.mean,
        std=image.std,
        interpolation=image.interpolation,
        tokenize=text.tokenize,
        pad_token=text.pad_token,
        context_length=text.context_length,
        unknown_token=text.unknown_token,
        resize=image.resize,
    )


def agreed_size(image_size: int | None, options: dict[str, Any], option: str) -> int | None:
    """`data.image_size` or the tower's own option of that meaning; both only if they are equal."""
    chosen = options.get(option)
    if image_size and chosen and image_size != chosen:
        raise ConfigError(
            f"data.image_size={image_size} and model.vision.options.{option}={chosen} disagree; "
            f"set only data.image_size."
        )
    return image_size or chosen


@contextmanager
def at_size(asked: int | None, own: int | None, owner: str) -> Iterator[None]:
    """Tell a position table that does not fit the image size asked for as that setting.

    Args:
        asked: `data.image_size`, or the option of that meaning.
        own: The size that the model was trained with, as far as it says.
        owner: The model.
    """
    try:
        yield
    except MisfitError as error:
        by_size = all(_POSITIONS.search(fault) for fault in error.faults)
        if not asked or not own or asked == own or not by_size:
            raise
        raise ConfigError(
            f"data.image_size={asked}, but the weights of {owner} are for images of {own} pixels "
            f"({'; '.join(error.faults)}): set data.image_size={own}, or leave it out."
        ) from error


def agreed_context(asked: int | None, longest: int, name: str) -> int:
    """Most tokens of a caption: what was asked for, else the tower's own up to 77."""
    if asked and asked > longest:
        raise ConfigError(
            f"model.text.context_length={asked} is more than the {longest} tokens that {name} "
            f"takes; lower it."
        )
    return asked or min(longest, DEFAULT_CONTEXT)
