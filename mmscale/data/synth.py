"""Synthetic pairs: captioned scenes of shapes in Flickr30k layout, rendered from a seed.

`render` writes what `sources` reads. Every scene follows from (seed, index) alone, so the same seed
gives the same bytes at any number of workers. Three knobs plant the faults that the doctor names.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmscale.data.captions import CAPTIONS, describe
from mmscale.data.painting import paint
from mmscale.data.pool import map_ordered
from mmscale.data.scenes import SHAPES, draw_scene
from mmscale.durable import replace_file
from mmscale.errors import ConfigError

_CHUNK = 64


@dataclass(frozen=True)
class _Pair:
    """One image to render: whose scene it shows, and whose scene its captions tell."""

    index: int
    split: str
    shown: int
    told: int


@dataclass(frozen=True)
class _Job:
    """What every image of a render shares."""

    folder: Path
    seed: int
    size: int
    quality: int
    ambiguity: float


def render(
    out: Path,
    images: int,
    seed: int,
    *,
    size: int = 96,
    quality: int = 90,
    val: int | None = None,
    test: int | None = None,
    mispaired: float = 0.0,
    duplicates: float = 0.0,
    ambiguity: float = 0.0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render captioned scenes into a folder in Flickr30k layout.

    Args:
        out: Folder that gets `images/`, `results_20130124.token` and `dataset_flickr30k.json`.
        images: How many; the last ones are `val`, then `test`, the others `train`.
        seed: Every scene is drawn from it and the image's index.
        size: Side of the square images, pixels.
        quality: Of the JPEGs.
        val: Images of that split; default a twelfth.
        test: Images of that split; default a twelfth.
        mispaired: Share of images whose captions belong to another image of their split.
        duplicates: Share of images that show another's scene anew, with captions of their own.
        ambiguity: Probability that a caption leaves so much out that it fits several scenes.
        workers: Processes that render.
        progress: Called with images done and images in all.

    Raises:
        ConfigError: The numbers make no data set.
    """
    twelfth = max(1, images // 12)
    val, test = (twelfth if count is None else count for count in (val, test))
    _check(images, val, test, size)
    _check_shares(mispaired=mispaired, duplicates=duplicates, ambiguity=ambiguity)
    folder = Path(out) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(folder, seed, size, quality, ambiguity)
    pairs = _plan(images, seed, val, test, mispaired, duplicates)
    entries = []
    chunks = [pairs[start : start + _CHUNK] for start in range(0, images, _CHUNK)]
    for batch in map_ordered(partial(_render_pairs, job), chunks, workers):
        entries += batch
        if progress:
            progress(len(entries), images)
    _write_captions(Path(out), entries)


def image_name(seed: int, index: int) -> str:
    """A numeric file name like Flickr's, different for every index of a seed."""
    # The factor is prime to the modulus, so no two indices meet.
    return f"{1_000_000_000 + (index * 2_654_435_761 + seed * 40_503) % 9_000_000_000}.jpg"


def _check(images: int, val: int, test: int, size: int) -> None:
    if val < 0 or test < 0 or val + test >= images:
        raise ConfigError(
            f"images={images} leaves none for training beside val={val} and test={test}; "
            f"render at least {max(0, val) + max(0, test) + 1}"
        )
    if size < 32:
        raise ConfigError(f"size={size} is too small to tell shapes apart; give at least 32 pixels")


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share} is not a share; give a number from 0 to 1")


def _plan(
    images: int, seed: int, val: int, test: int, mispaired: float, duplicates: float
) -> list[_Pair]:
    shown, told = list(range(images)), list(range(images))
    train = images - val - test
    split_of: dict[int, str] = {}
    for split, members in (
        ("train", range(train)),
        ("val", range(train, train + val)),
        ("test", range(train + val, images)),
    ):
        split_of |= dict.fromkeys(members, split)
        draw = random.Random(f"duplicates/{seed}/{split}")
        copies = draw.sample(members, min(round(duplicates * len(members)), len(members) // 2))
        originals = sorted(set(members) - set(copies))
        for copy in copies:
            shown[copy] = told[copy] = draw.choice(originals)
        draw = random.Random(f"mispaired/{seed}/{split}")
        wrong = draw.sample(members, _derangeable(round(mispaired * len(members)), len(members)))
        truth = [told[index] for index in wrong]
        for index, other in zip(wrong, truth[1:] + truth[:1], strict=True):
            told[index] = other
    return [_Pair(index, split_of[index], shown[index], told[index]) for index in range(images)]


def _derangeable(count: int, members: int) -> int:
    # One image alone has nobody to swap captions with.
    if members < 2 or count == 0:
        return 0
    return max(2, count)


def _render_pairs(job: _Job, pairs: Sequence[_Pair]) -> list[dict[str, Any]]:
    return [_render_pair(job, pair) for pair in pairs]


def _render_pair(job: _Job, pair: _Pair) -> dict[str, Any]:
    """Write one image; its entry of the Karpathy file."""
    scene = draw_scene(job.seed, pair.shown)
    name = image_name(job.seed, pair.index)
    (job.folder / name).write_bytes(paint(scene, job.size, job.quality, (job.seed, pair.index)))
    told = draw_scene(job.seed, pair.told)
    captions = describe(told, f"{job.seed}/{pair.index}", job.ambiguity)
    sentids = list(range(pair.index * CAPTIONS, (pair.index + 1) * CAPTIONS))
    return {
        "filename": name,
        "imgid": pair.index,
        "sentids": sentids,
        "split": pair.split,
        "label": SHAPES.index(scene.things[0].shape),
        "label_name": scene.things[0].shape,
        "sentences": [
            {
                "raw": caption,
                "tokens": re.findall(r"[a-z]+", caption.lower()),
                "imgid": pair.index,
                "sentid": sentid,
            }
            for caption, sentid in zip(captions, sentids, strict=True)
        ],
    }


def _write_captions(out: Path, entries: list[dict[str, Any]]) -> None:
    lines = [
        f"{entry['filename']}#{place}\t{sentence['raw']}\n"
        for entry in entries
        for place, sentence in enumerate(entry["sentences"])
    ]
    replace_file(out / "results_20130124.token", "".join(lines).encode())
    content = {"images": entries, "dataset": "flickr30k"}
    replace_file(out / "dataset_flickr30k.json", json.dumps(content).encode() + b"\n")
