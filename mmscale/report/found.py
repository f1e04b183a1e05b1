"""The page of `mmscale search`: one file with the photographs that were found inside it."""

import base64
from dataclasses import asdict
from pathlib import Path

from mmscale.data.damage import DamagedSampleError
from mmscale.data.images import ImageSet, read_at
from mmscale.data.pixels import thumbnail
from mmscale.evaluation.search import Found
from mmscale.report.examples import PICTURE_PREFIX
from mmscale.report.template import write_html

_SIDE = 224  # pixels, of a photograph's longer side


def write_found(
    path: Path,
    found: list[Found],
    images: ImageSet,
    words: str,
    picture: Path | None,
    **facts: object,
) -> None:
    """Draw what was found.

    Args:
        path: The page.
        found: Best first.
        images: The set, from which the photographs are read.
        words: What was looked for; empty where only a picture was.
        picture: The image that was looked for.
        facts: `model`, `data` and `searched`: names, and how many images there are.
    """
    places = [entry.place for entry in found]
    shown = [
        asdict(entry) | {"picture": image and small_picture(image.content, entry.key)}
        for entry, image in zip(found, read_at(images, places), strict=True)
    ]
    asked = None if picture is None else small_picture(picture.read_bytes(), str(picture))
    write_html(path, "search.html", found=shown, words=words.strip(), picture=asked, **facts)


def small_picture(content: bytes, where: str) -> str | None:
    """A photograph as an address that holds it; None where it cannot be decoded."""
    try:
        copy = thumbnail(content, where, _SIDE)
    except DamagedSampleError:
        return None
    return PICTURE_PREFIX + base64.b64encode(copy).decode()
