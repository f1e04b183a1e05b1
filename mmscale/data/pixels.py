"""Encoded images to square uint8 rows; bytes to numbers is the device's work.

JPEGs are decoded by libjpeg-turbo into a tensor, all else by Pillow; torchvision resamples. The one
place where depth and alpha are decided, and where small copies for pages are made.

Rows keep the channels of a pixel side by side in memory (`channels_last`), as decoders write them
and the fastest resampling wants them. `normalise` gives the plain layout.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from mmscale.contracts import InputSpec
from mmscale.data.damage import DamagedSampleError, reason_of, warnings_named
from mmscale.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
REDUCTIONS = (8, 4, 2)
# Pillow knows dozens of formats, and opens some of them with other programs.
_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
# For each EXIF orientation: whether rows become columns, then which dimensions are reversed.
_TURNS = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


@dataclass(frozen=True)
class Picture:
    """An encoded image of which only the header was read.

    Attributes:
        height: Of the upright picture, pixels.
        width: Of the upright picture, pixels.
    """

    height: int
    width: int
    _content: bytes
    _where: str
    _image: Image.Image
    _orientation: int

    def pixels(self, reduction: int = 1) -> UInt8[Tensor, "3 h w"]:
        """The pixels, with the channels of one pixel side by side in memory.

        Args:
            reduction: 1, or one of `REDUCTIONS`: a JPEG is decoded to that part of its sides by
                taking only the low frequencies of its blocks; other formats stay as they are.

        Raises:
            DamagedSampleError: It cannot be decoded to its end.
        """
        with _naming(self._where):
            is_jpeg = self._image.format in ("JPEG", "MPO")
            if is_jpeg and reduction == 1 and self._image.mode in ("RGB", "L"):
                data = torch.frombuffer(bytearray(self._content), dtype=torch.uint8)
                stored = decode_jpeg(data, ImageReadMode.RGB)
            else:
                if is_jpeg and reduction > 1:
                    size = (self._image.width // reduction, self._image.height // reduction)
                    self._image.draft(None, size)
                image = in_rgb(self._image)
                stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self._orientation not in _TURNS:
            return stored
        transposed, reversed_dims = _TURNS[self._orientation]
        return (stored.transpose(1, 2) if transposed else stored).flip(reversed_dims)


@dataclass(frozen=True)
class KeptPicture:
    """A decoded picture that a cache keeps, used like a `Picture`.

    Attributes:
        height: Of the whole picture, pixels: crops are drawn as they are without a cache.
        width: Of the whole picture, pixels.
        stored: What is kept of it.
    """

    height: int
    width: int
    stored: UInt8[Tensor, "h w 3"]

    def pixels(self, reduction: int = 1) -> UInt8[Tensor, "3 h w"]:
        """The pixels as they are kept; they are small already."""
        return self.stored.permute(2, 0, 1)


def open_picture(content: bytes, where: str) -> Picture:
    """Read an image's header.

    Raises:
        DamagedSampleError: Not a JPEG, PNG or WebP image, or too many pixels.
    """
    with _naming(where):
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise DamagedSampleError(f"{where}: {pixels} pixels, more than {MAX_PIXELS}")
        orientation = orientation_of(image)
    height, width = image.height, image.width
    if orientation in _TURNS and _TURNS[orientation][0]:
        height, width = width, height
    return Picture(height, width, content, where, image, orientation)


def decode(content: bytes, where: str) -> UInt8[Tensor, "3 h w"]:
    """Upright RGB pixels.

    Raises:
        DamagedSampleError: Not an image, truncated, or too many pixels.
    """
    return open_picture(content, where).pixels()


def orientation_of(image: Image.Image) -> int:
    """How a picture is turned, by its EXIF tag; 1: not at all."""
    # Most JPEGs have no such block, and looking for a tag in none costs as much as the header.
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    # A picture with a damaged tag block is shown as it lies.
    with suppress(Exception):
        return image.getexif().get(_ORIENTATION, 1)
    return 1


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn whatever a decoder says into one line about this sample."""
    try:
        with warnings_named(where):
            yield
    except DamagedSampleError:
        raise
    except Exception as error:
        raise DamagedSampleError(f"{where}: undecodable image ({reason_of(error)})") from error


# Pillow clips what is above 255 instead of scaling it: a radiograph would become white.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Nothing says which of their values is white.
_WITHOUT_A_WHITE = ("I", "F")


def in_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB; of 16-bit grey the upper eight bits, as of 16-bit colour and in libpng.

    Palettes are looked up and alpha is left out, as every reader of the field does.

    Raises:
        DataError: Its values are 32-bit integers or floating-point numbers.
    """
    if image.mode in _WITHOUT_A_WHITE:
        raise DataError(
            f"mode {image.mode} holds 32-bit values of no known range; scale them to 0..255 and "
            "convert the image to mode L"
        )
    if image.mode in _SIXTEEN_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours, without Pillow's warning.
        image = image.convert("RGBA")
    return image.convert("RGB")


Box = tuple[int, int, int, int]

_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10
# A reduced picture keeps at least so many pixels for each one of the crop: fewer would show.
_RESERVE = 2.0


@dataclass(frozen=True)
class EvalTransform:
    """The whole picture as the model's `resize` says, as OpenCLIP evaluates with.

    A class, for it travels to processes that are not forked (macOS, newer Pythons).
    """

    spec: InputSpec

    def __call__(self, pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 size size"]:
        """The square that is shown to the model."""
        size, spec = self.spec.image_size, self.spec
        resized = resize_whole(_block(pixels), size, spec.resize, spec.interpolation)
        # Where the picture is smaller than the square, this surrounds it with zeros.
        return functional.center_crop_image(resized, [size] * 2)[0]


def resize_whole(
    pixels: UInt8[Tensor, "... h w"], side: int, resize: str, interpolation: str
) -> UInt8[Tensor, "... height width"]:
    """A picture whose shortest side, longest side or both (`InputSpec.resize`) are `side` pixels.

    Source: `image_transform` of OpenCLIP, whose rounding this is.
    """
    size = [side]
    if resize == "squash":
        size = [side, side]
    elif resize == "longest":
        ratio = max(pixels.shape[-2:]) / side
        size = [max(1, round(length / ratio)) for length in pixels.shape[-2:]]
    return functional.resize_image(pixels, size, InterpolationMode(interpolation), antialias=True)


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
        open_with: Callable[[bytes, str], Picture | KeptPicture] = open_picture,
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

    def _crop(self, pixels: Tensor, picture: Picture | KeptPicture, box: Box) -> Tensor:
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
    mean, std = (_channels(tuple(values), pixels.device) for values in (spec.mean, spec.std))
    # One block, changed in place: at 256 rows of 224 pixels each further one would be 154 MB.
    values = torch.empty(pixels.shape, device=pixels.device).copy_(pixels)
    return values.div_(255).sub_(mean).div_(std)


@cache
def _channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """A number a channel, sent once: the host would wait for each copy."""
    return torch.tensor(values, device=device)[:, None, None]


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


SIDE = 112  # pixels, of the longer side
_QUALITY = 62


def thumbnail(content: bytes, where: str, side: int = SIDE) -> bytes:
    """An encoded image as a small WebP, upright, without what its file says of the photographer.

    Args:
        content: The encoded image.
        where: Names it in messages.
        side: Most pixels of its longer side.

    Raises:
        DamagedSampleError: It cannot be decoded.
    """
    picture = open_picture(content, where)
    longer = max(picture.height, picture.width)
    reduction = next((r for r in REDUCTIONS if longer >= 2 * r * side), 1)
    pixels = picture.pixels(reduction)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()


def difference(first: bytes, second: bytes) -> float:
    """How unlike two thumbnails look: mean difference of a channel, 0 to 255, at 24 x 24 pixels."""
    rows = []
    for content in (first, second):
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
            rows.append(image.convert("RGB").resize((24, 24), Image.Resampling.BOX).tobytes())
    return sum(abs(a - b) for a, b in zip(*rows, strict=True)) / len(rows[0])
