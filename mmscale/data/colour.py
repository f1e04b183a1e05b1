"""Pillow's images of any mode to 8-bit RGB: the one place where depth and alpha are decided."""

import numpy as np
from PIL import Image

from mmscale.errors import DataError

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
