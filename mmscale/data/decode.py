"""Image bytes to upright RGB pixels: JPEGs by libjpeg-turbo into a tensor, all else by Pillow."""

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

from mmscale.data.colour import in_rgb
from mmscale.data.complaints import reason_of, warnings_named
from mmscale.data.reader import DamagedSampleError

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
