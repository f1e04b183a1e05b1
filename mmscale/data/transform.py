"""Encoded images to square uint8 rows, by torchvision; bytes to numbers is the device's work.

Rows keep the channels of a pixel side by side in memory (`channels_last`), as decoders write them
and the fastest resampling wants them. `normalise` gives the plain layout.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from mmscale.contracts import InputSpec
from mmscale.data.decode import REDUCTIONS, Picture, open_picture
from mmscale.data.decoded_cache import Kept

Box = tuple[int, int, int, int]

_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10
# A reduced picture keeps at least so many pixels for each one of the crop: fewer would show.
_RESERVE = 2.0


@dataclass(frozen=True)
class EvalTransform:
    """Shortest side to the input size, centre crop: what OpenCLIP evaluates with.

    A class, for it travels to processes that are not forked (macOS, newer Pythons).
    """

    spec: InputSpec

    def __call__(self, pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 size size"]:
        """The square that is shown to the model."""
        size, mode = self.spec.image_size, InterpolationMode(self.spec.interpolation)
        resized = functional.resize_image(_block(pixels), [size], mode, antialias=True)
        return functional.center_crop_image(resized, [size] * 2)[0]


class TrainTransform:
    """Encoded images to training rows, each drawn from its own seed.

    Args:
        spec: Size and interpolation.
        augment: A value of `data.augment`.
        crop_scale: Share of the image's area that a crop keeps, from and to.
        open_with: Gives the picture of an encoded image: decoded when it is asked for its pixels,
            or one that a cache keeps.
    """

    def __init__(
        self,
        spec: InputSpec,
        augment: str,
        crop_scale: tuple[float, float],
        open_with: Callable[[bytes, str], Picture | Kept] = open_picture,
    ):
        self._size, self._interpolation = spec.image_size, spec.interpolation
        self._scale, self._open = crop_scale, open_with
        self._whole = EvalTransform(spec) if augment == "none" else None
        self._more = augmentation(augment)

    def __call__(
        self, content: bytes, where: str, seeds: Sequence[int]
    ) -> list[UInt8[Tensor, "3 size size"]]:
        """A row for each seed, all from one decoding.

        Raises:
            DamagedSampleError: The image cannot be decoded.
        """
        picture = self._open(content, where)
        if self._whole:
            return [self._whole(picture.pixels())] * len(seeds)
        boxes = [
            draw_box(picture.height, picture.width, self._scale, random.Random(seed))
            for seed in seeds
        ]
        pixels = picture.pixels(self._reduction(boxes))
        rows = [self._crop(pixels, picture, box) for box in boxes]
        if self._more is None:
            return rows
        return [_drawn_from(seed, self._more, row) for seed, row in zip(seeds, rows, strict=True)]

    def _reduction(self, boxes: Sequence[Box]) -> int:
        shortest = min(min(height, width) for _, _, height, width in boxes)
        wanted = shortest / (self._size * _RESERVE)
        return next((part for part in REDUCTIONS if part <= wanted), 1)

    def _crop(self, pixels: Tensor, picture: Picture | Kept, box: Box) -> Tensor:
        down, across = pixels.shape[1] / picture.height, pixels.shape[2] / picture.width
        top, left = round(box[0] * down), round(box[1] * across)
        height, width = max(1, round(box[2] * down)), max(1, round(box[3] * across))
        part = pixels[:, top : top + height, left : left + width]
        return _resize(part, self._size, self._interpolation)


def draw_box(height: int, width: int, scale: tuple[float, float], draw: random.Random) -> Box:
    """Top, left, height and width of a crop, drawn as torchvision's RandomResizedCrop draws it.

    The share of the area is uniform, the logarithm of the aspect ratio too. A picture so narrow
    that nothing fits gives its middle, cut to the nearest ratio allowed.
    """
    low, high = map(math.log, _ASPECTS)
    for _ in range(_TRIES):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(low, high))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            return draw.randint(0, height - down), draw.randint(0, width - across), down, across
    across = min(width, round(height * _ASPECTS[1]))
    down = min(height, round(width / _ASPECTS[0]))
    return (height - down) // 2, (width - across) // 2, down, across


def stack_rows(rows: Sequence[UInt8[Tensor, "3 h w"]]) -> UInt8[Tensor, "b 3 h w"]:
    """Rows in one block; a worker writes them right into the memory that it shares."""
    return default_collate([row.permute(1, 2, 0) for row in rows]).permute(0, 3, 1, 2)


def normalise(pixels: UInt8[Tensor, "b c h w"], spec: InputSpec) -> Float[Tensor, "b c h w"]:
    """Bytes to fp32 with the tower's mean and deviation, on whatever device they lie."""
    mean = torch.tensor(spec.mean, device=pixels.device)[:, None, None]
    std = torch.tensor(spec.std, device=pixels.device)[:, None, None]
    # One block, changed in place: at 256 rows of 224 pixels each further one would be 154 MB.
    values = torch.empty(pixels.shape, device=pixels.device).copy_(pixels)
    return values.div_(255).sub_(mean).div_(std)


def _resize(pixels: Tensor, side: int, interpolation: str) -> Tensor:
    # What torchvision's resize calls, without its 0.1 ms of questions.
    return interpolate(_block(pixels), (side, side), mode=interpolation, antialias=True)[0]


def _block(pixels: Tensor) -> Tensor:
    """A block of one row whose strides say that channels lie side by side: results keep to it."""
    return pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def _drawn_from(seed: int, augment: Callable[[Tensor], Tensor], row: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which also seeds every accelerator and costs more than a resize.
        torch.random.default_generator.manual_seed(seed)
        return augment(row)


# The strengths that OpenCLIP's recipes give to --aug-cfg.
_JITTER, _JITTER_SHARE, _GREY_SHARE = (0.32, 0.32, 0.32, 0.08), 0.8, 0.2


def augmentation(name: str) -> Callable[[Tensor], Tensor] | None:
    """uint8 crop to uint8 crop; None where the crop stays as it is.

    `flip` mirrors half of the pictures, which makes captions wrong that say left or right.
    """
    if name == "flip":
        return v2.RandomHorizontalFlip()
    if name == "color_jitter":
        return v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(*_JITTER)], _JITTER_SHARE),
                v2.RandomGrayscale(_GREY_SHARE),
            ]
        )
    if name == "randaugment":
        return v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)
    if name == "trivialaugment":
        return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    return None
