"""Small copies of photographs, for pages."""

import io

from PIL import Image

from mmscale.data.decode import REDUCTIONS, open_picture

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
