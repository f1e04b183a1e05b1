"""Images on their way into a shard: each decoded once, turned upright and shrunk where asked."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Treatment:
    """What is done to every image.

    Attributes:
        resize: Shorter side of larger images, pixels; None leaves their bytes untouched.
        max_pixels: Images with more are rejected before they are decoded.
    """

    resize: int | None
    max_pixels: int


class RejectedImageError(Exception):
    """Why an image was left out."""


def prepare_image(path: Path, treatment: Treatment) -> tuple[str, bytes]:
    """An image's ending and bytes for a shard: its own, or turned upright and shrunk.

    Raises:
        RejectedImageError: It is missing, empty, too large, or cannot be decoded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RejectedImageError(f"cannot be read ({error.strerror})") from error
    if not content:
        raise RejectedImageError("has zero bytes")
    with _without_pillow_limit():
        return _treat(content, treatment)


def _treat(content: bytes, treatment: Treatment) -> tuple[str, bytes]:
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Exception as error:
        raise RejectedImageError("is not a JPEG, PNG or WebP image") from error
    with image:
        # Read from the header: nothing is decoded yet.
        if image.width * image.height > treatment.max_pixels:
            raise RejectedImageError(
                f"has {image.width} x {image.height} pixels, more than {treatment.max_pixels}"
            )
        form = str(image.format)
        try:
            image.load()
            upright = _upright(image)
            shrunk = _shrink(upright, treatment.resize)
            if shrunk is image:
                return _SUFFIXES[form], content
            return _SUFFIXES[form], _encode(shrunk, form)
        except Exception as error:
            raise RejectedImageError(f"cannot be decoded ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    orientation = 1
    # A picture with a damaged tag block is shown as it lies.
    with suppress(Exception):
        orientation = image.getexif().get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _shrink(image: Image.Image, side: int | None) -> Image.Image:
    if side is None or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if image.mode not in ("RGB", "L", "RGBA"):
        image = image.convert("RGB")
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encode(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    if form in ("JPEG", "MPO"):
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image.save(file, "JPEG", quality=95, exif=b"")
    else:
        image.save(file, form, exif=b"", **({"quality": 95} if form == "WEBP" else {}))
    return file.getvalue()


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own limit on pixels, so that `max_pixels` alone decides."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
