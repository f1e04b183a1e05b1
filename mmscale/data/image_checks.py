"""Images on their way into a shard: each decoded once, and written anew only where asked."""

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from mmscale.data.complaints import reason_of, warnings_named
from mmscale.data.decode import in_rgb

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
_QUALITY = 95


@dataclass(frozen=True)
class Treatment:
    """What is done to every image; with neither size nor quality their bytes are kept.

    Attributes:
        resize: Shorter side that larger images are shrunk to, pixels.
        quality: Encode all images anew, JPEG and WebP with this quality; None: only those shrunk.
        max_pixels: Images with more are rejected before they are decoded.
    """

    resize: int | None
    quality: int | None
    max_pixels: int


class RejectedImageError(Exception):
    """Why an image was left out."""


def prepare_image(path: Path, treatment: Treatment) -> tuple[str, bytes]:
    """An image's ending and bytes for a shard: its own, or encoded anew and upright.

    Raises:
        RejectedImageError: It is missing, empty, too large, or cannot be decoded.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RejectedImageError("missing file: what has this name is not a file")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RejectedImageError("missing file") from error
    except OSError as error:
        raise RejectedImageError(f"unreadable file: {error.strerror}") from error
    if not content:
        raise RejectedImageError("zero bytes")
    with _without_pillow_limit(), warnings_named(str(path)):
        return _treat(content, treatment)


def _treat(content: bytes, treatment: Treatment) -> tuple[str, bytes]:
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Exception as error:
        raise RejectedImageError("undecodable: not a JPEG, PNG or WebP image") from error
    with image:
        # Read from the header: nothing is decoded yet.
        if image.width * image.height > treatment.max_pixels:
            raise RejectedImageError(
                f"more pixels than {treatment.max_pixels}: {image.width} x {image.height}"
            )
        form = str(image.format)
        try:
            image.load()
            if treatment.quality is None and not _is_larger(image, treatment.resize):
                return _SUFFIXES[form], content
            picture = _shrink(_upright(image), treatment.resize)
            return _SUFFIXES[form], _encode(picture, form, treatment.quality or _QUALITY)
        except Exception as error:
            raise RejectedImageError(f"undecodable: {reason_of(error)}") from error


def _is_larger(image: Image.Image, side: int | None) -> bool:
    return side is not None and min(image.size) > side


def _upright(image: Image.Image) -> Image.Image:
    orientation = 1
    # A picture with a damaged tag block is shown as it lies.
    with suppress(Exception):
        orientation = image.getexif().get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _shrink(image: Image.Image, side: int | None) -> Image.Image:
    if side is None or not _is_larger(image, side):
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if image.mode not in ("RGB", "L", "RGBA"):
        image = in_rgb(image)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encode(image: Image.Image, form: str, quality: int) -> bytes:
    file = io.BytesIO()
    if form in ("JPEG", "MPO"):
        image = image if image.mode in ("RGB", "L") else in_rgb(image)
        image.save(file, "JPEG", quality=quality, exif=b"")
    else:
        image.save(file, form, exif=b"", **({"quality": quality} if form == "WEBP" else {}))
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
