"""Image bytes to upright RGB pixels: JPEGs by libjpeg-turbo into a tensor, all else by Pillow.

The one place where depth and alpha are decided, and where small copies for pages are made.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

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
        orientation = _orientation(image)
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


def _orientation(image: Image.Image) -> int:
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


SIDE = 112  # pixels, of the longer side
_QUALITY = 62


def thumbnail(content: bytes, where: str) -> bytes:
    """An encoded image as a small WebP, upright, without what its file says of the photographer.

    Raises:
        DamagedSampleError: It cannot be decoded.
    """
    picture = open_picture(content, where)
    longer = max(picture.height, picture.width)
    reduction = next((r for r in REDUCTIONS if longer >= 2 * r * SIDE), 1)
    pixels = picture.pixels(reduction)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
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
