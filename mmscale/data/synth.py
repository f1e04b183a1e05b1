"""Synthetic pairs: captioned scenes of shapes in Flickr30k layout, rendered from a seed.

`render` writes what `sources` reads. Every scene follows from (seed, index) alone, so the same seed
gives the same bytes at any number of workers. Three knobs plant the faults that the doctor names.
"""

import io
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmscale.data.manifest import replace_file
from mmscale.data.pool import map_ordered
from mmscale.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 40),
    "green": (45, 160, 60),
    "cyan": (60, 210, 220),
    "blue": (40, 80, 220),
    "purple": (140, 50, 180),
    "white": (245, 245, 245),
}
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_TONES = {"dark": (10, 45), "grey": (85, 120), "pale": (165, 195)}
_SUPERSAMPLING = 2
_CAPTIONS = 5
_CHUNK = 64


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `cell` counts the 3 x 3 grid from the top left, row by row."""

    shape: str
    colour: str
    large: bool
    cell: int

    @property
    def row(self) -> int:
        """Row of the grid, from the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column of the grid, from the left."""
        return self.cell % 3


@dataclass(frozen=True)
class Scene:
    """What an image shows; the first thing is its main one."""

    things: tuple[Thing, ...]
    tone: str


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
    for name, share in (
        ("mispaired", mispaired),
        ("duplicates", duplicates),
        ("ambiguity", ambiguity),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share} is not a share; give a number from 0 to 1")
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


def draw_scene(seed: int, index: int) -> Scene:
    """The scene of an image: 1 to 3 things that differ in colour or shape, each in its own cell."""
    draw = random.Random(f"scene/{seed}/{index}")
    count = draw.choices((1, 2, 3), (2, 5, 4))[0]
    looks = draw.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
    cells = draw.sample(range(9), count)
    things = [
        Thing(shape, colour, draw.random() < 0.5, cell)
        for (shape, colour), cell in zip(looks, cells, strict=True)
    ]
    return Scene(
        tuple(sorted(things, key=lambda thing: not thing.large)), draw.choice(list(_TONES))
    )


def _check(images: int, val: int, test: int, size: int) -> None:
    if val < 0 or test < 0 or val + test >= images:
        raise ConfigError(
            f"images={images} leaves none for training beside val={val} and test={test}; "
            f"render at least {max(0, val) + max(0, test) + 1}"
        )
    if size < 32:
        raise ConfigError(f"size={size} is too small to tell shapes apart; give at least 32 pixels")


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
    sentids = list(range(pair.index * _CAPTIONS, (pair.index + 1) * _CAPTIONS))
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


# --- Pixels ---


def paint(scene: Scene, size: int, quality: int, noise: tuple[int, int]) -> bytes:
    """The scene as a JPEG; places, angles, tints and grain are drawn from `noise`."""
    draw = np.random.default_rng([part % 2**63 for part in noise])
    side = size * _SUPERSAMPLING
    tone = draw.integers(*_TONES[scene.tone])
    blotches = tone + draw.integers(-14, 15, (5, 5, 1)) + draw.integers(-8, 9, (5, 5, 3))
    canvas = Image.fromarray(blotches.clip(0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _paint_thing(pen, thing, side / 3, draw)
    grain = draw.integers(-9, 10, (size, size, 3), dtype=np.int8)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.int16) + grain
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _paint_thing(
    pen: ImageDraw.ImageDraw, thing: Thing, cell: float, draw: np.random.Generator
) -> None:
    radius = cell * (draw.uniform(0.40, 0.46) if thing.large else draw.uniform(0.25, 0.29))
    free = cell / 2 - radius
    x = (thing.column + 0.5) * cell + draw.uniform(-free, free)
    y = (thing.row + 0.5) * cell + draw.uniform(-free, free)
    angle = draw.uniform(-0.2, 0.2)
    tint = draw.integers(-12, 13, 3)
    colour = tuple(int(v) for v in (np.array(COLOURS[thing.colour]) + tint).clip(0, 255))
    rim = tuple(channel // 3 for channel in colour)
    if thing.shape == "ring":
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, outline=rim, width=round(radius * 0.45))
        inner = tuple(v + s for v, s in zip(box, (2, 2, -2, -2), strict=True))
        pen.ellipse(inner, outline=colour, width=round(radius * 0.45) - 4)
        return
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
    outline = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _OUTLINES[thing.shape]]
    # The dark rim keeps every colour apart from every background.
    pen.polygon(outline, fill=colour, outline=rim, width=2)


def _outlines() -> dict[str, list[tuple[float, float]]]:
    """Corners of each shape in the unit circle, y downwards."""
    turns = [math.tau * step / 40 for step in range(40)]
    spikes = [(1.0 if point % 2 == 0 else 0.42, math.tau * point / 10) for point in range(10)]
    arm, third = 0.92, 0.31
    half_cross = [(arm, third), (third, third), (third, arm)]
    half_cross += [(-third, arm), (-third, third), (-arm, third)]
    lobes = [
        (
            16 * math.sin(turn) ** 3 / 17,
            -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn)) / 17,
        )
        for turn in turns
    ]
    half = [math.pi * (0.30 + 1.40 * step / 20) for step in range(21)]
    outer = [(math.cos(turn), math.sin(turn)) for turn in half]
    hollow = [(0.42 + 0.83 * math.cos(turn), 0.83 * math.sin(turn)) for turn in reversed(half)]
    return {
        "circle": [(math.cos(turn), math.sin(turn)) for turn in turns],
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
        "star": [(far * math.sin(turn), -far * math.cos(turn)) for far, turn in spikes],
        "cross": [(u * sign, v * sign) for sign in (1, -1) for u, v in half_cross],
        "heart": lobes,
        "crescent": [(x * 0.95, y * 0.95) for x, y in [*outer, *hollow]],
    }


_OUTLINES = _outlines()


# --- Words ---


def describe(scene: Scene, draw_from: str, ambiguity: float = 0.0) -> list[str]:
    """Five different true captions, each with enough to know the scene among hundreds."""
    draw = random.Random(f"captions/{draw_from}")
    captions: list[str] = []
    plain, vague = list(_TEMPLATES), list(_VAGUE)
    draw.shuffle(plain)
    draw.shuffle(vague)
    while len(captions) < _CAPTIONS:
        source = vague if vague and draw.random() < ambiguity else plain
        things = draw.sample(scene.things, len(scene.things))
        caption = source.pop()(things, scene.tone, draw)
        caption = caption[0].upper() + caption[1:]
        if caption not in captions:
            captions.append(caption)
    return captions


def _size(thing: Thing, draw: random.Random) -> str:
    return draw.choice(("large", "big") if thing.large else ("small", "little"))


def _place(thing: Thing, draw: random.Random) -> str:
    """Where a thing is, without an article: `top left`, `middle`, `right`."""
    if thing.cell == 4:
        return draw.choice(("centre", "middle"))
    if thing.row == 1:
        return f"{_COLUMNS[thing.column]} side"
    if thing.column == 1:
        return f"{_ROWS[thing.row]} centre"
    vertical = _ROWS[thing.row]
    if draw.random() < 0.3:
        vertical = {"top": "upper", "bottom": "lower"}[vertical]
    return f"{vertical} {_COLUMNS[thing.column]}"


def _at(thing: Thing, draw: random.Random) -> str:
    place = _place(thing, draw)
    return f"{'on' if place.endswith('side') else 'in'} the {place}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _look(thing: Thing) -> str:
    return _article(f"{thing.colour} {thing.shape}")


def _full(thing: Thing, draw: random.Random) -> str:
    return _article(f"{_size(thing, draw)} {thing.colour} {thing.shape}")


def _join(parts: Sequence[str], mark: str = ",") -> str:
    return parts[0] if len(parts) == 1 else f"{f'{mark} '.join(parts[:-1])} and {parts[-1]}"


def _relation(thing: Thing, other: Thing, draw: random.Random) -> str:
    """How `thing` lies to `other`; they are never in one cell."""
    true = []
    if thing.column != other.column:
        true.append("to the left of" if thing.column < other.column else "to the right of")
    if thing.row != other.row:
        true.append("above" if thing.row < other.row else "below")
    return draw.choice(true)


def _listed(things: list[Thing], tone: str, draw: random.Random) -> str:
    parts = [f"{_full(t, draw)} {_at(t, draw)}" for t in things]
    return f"{_join(parts)}."


def _places_first(things: list[Thing], tone: str, draw: random.Random) -> str:
    parts = [f"{_at(t, draw)} {_full(t, draw)}" for t in things]
    return f"{_join(parts)} on a {tone} background."


def _related(things: list[Thing], tone: str, draw: random.Random) -> str:
    if len(things) == 1:
        return f"only {_full(things[0], draw)}, placed {_at(things[0], draw)}."
    first, *others = things
    parts = [f"{_relation(first, other, draw)} {_full(other, draw)}" for other in others]
    return f"{_full(first, draw)} is {_join(parts)} on a {tone} background."


def _counted(things: list[Thing], tone: str, draw: random.Random) -> str:
    count = ("one shape", "two shapes", "three shapes")[len(things) - 1]
    parts = [f"{_full(t, draw)} {_at(t, draw)}" for t in things]
    return f"{count} on a {tone} background: {_join(parts)}."


def _stated(things: list[Thing], tone: str, draw: random.Random) -> str:
    parts = [f"the {t.shape} {_at(t, draw)} is {_size(t, draw)} and {t.colour}" for t in things]
    return f"{'; '.join(parts)}."


def _backed(things: list[Thing], tone: str, draw: random.Random) -> str:
    parts = [f"{_full(t, draw)} {_at(t, draw)}" for t in things]
    return f"against a {tone} background {_join(parts)}."


def _there(things: list[Thing], tone: str, draw: random.Random) -> str:
    verb = "is" if len(things) == 1 else "are"
    parts = [f"{_full(t, draw)} ({_place(t, draw)})" for t in things]
    return f"there {verb} {_join(parts)}."


def _terse(things: list[Thing], tone: str, draw: random.Random) -> str:
    parts = [f"{t.colour} {t.shape}, {_size(t, draw)}, {_place(t, draw)}" for t in things]
    return f"{'; '.join(parts)}; {tone} background"


def _filled(things: list[Thing], tone: str, draw: random.Random) -> str:
    parts = [f"the {_place(t, draw)} holds {_full(t, draw)}" for t in things]
    return f"{_join(parts)}."


_TEMPLATES = (
    _listed,
    _places_first,
    _related,
    _counted,
    _stated,
    _backed,
    _there,
    _terse,
    _filled,
)

# Each leaves out enough to fit many scenes.
_VAGUE: tuple[Callable[[list[Thing], str, random.Random], str], ...] = (
    lambda things, tone, draw: f"there is {_article(things[0].shape)}.",
    lambda things, tone, draw: f"something {things[0].colour} on a {tone} background.",
    lambda things, tone, draw: f"{_article(_size(things[0], draw))} shape in the picture.",
    lambda things, tone, draw: f"a picture with {_look(things[0])}.",
    lambda things, tone, draw: f"{_article(things[-1].colour)} object can be seen.",
    lambda things, tone, draw: f"a shape {_at(things[-1], draw)}.",
)
