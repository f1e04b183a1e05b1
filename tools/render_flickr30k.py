"""Renders a picture of a photograph's size for every image that a token file names.

python tools/render_flickr30k.py OUT CAPTIONS [PROCESSES]

CAPTIONS is a folder with Flickr30k's token file (plain or gzipped) and its split lists, whose
images are not at hand. OUT gets pictures of 500 x 375 pixels under these names and copies of the
captions, so that `mmscale pack OUT` packs a data set of the true size.
"""

import gzip
import hashlib
import io
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mmscale.data.pool import map_ordered

WIDTH, HEIGHT = 500, 375
QUALITY = 90
GRAINS = 16
CHUNK = 128


def main(words: list[str]) -> None:
    out, captions = Path(words[0]), Path(words[1])
    workers = int(words[2]) if len(words) > 2 else 2
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    token = next(captions.glob("*.token*"))
    for file in (token, *captions.glob("*_images.txt")):
        shutil.copyfile(file, out / file.name)
    read = gzip.open if token.suffix == ".gz" else open
    with read(token, "rt", encoding="utf-8") as lines:
        names = list(dict.fromkeys(line.split("#", 1)[0] for line in lines))
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    written = 0
    for size in map_ordered(partial(render_all, images), chunks, workers):
        written += size
    print(f"{len(names):,} pictures of {written / len(names) / 1024:.0f} KiB in {images}")


def render_all(folder: Path, names: list[str]) -> int:
    """Write some pictures; their bytes in all."""
    grain = np.random.default_rng(0).normal(0, 8, (GRAINS, HEIGHT, WIDTH, 3)).astype(np.int16)
    size = 0
    for name in names:
        content = render(name, grain)
        (folder / name).write_bytes(content)
        size += len(content)
    return size


def render(name: str, grain: np.ndarray) -> bytes:
    """Blotches of colour under a film's grain: smooth and rough parts, as a photograph has them."""
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    blotches = draw.integers(0, 256, (*draw.integers(4, 24, 2), 3), dtype=np.uint8)
    picture = Image.fromarray(blotches).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    film = np.roll(grain[draw.integers(GRAINS)], draw.integers(0, HEIGHT, 2), (0, 1))
    pixels = (np.asarray(picture, np.int16) + film).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
