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

from mmscale.data.pool import map_ordered
from mmscale.data.scenes import SHAPES, Scene, Thing, draw_scene, paint
from mmscale.errors import ConfigError
from mmscale.outputs import replace_file

_CHUNK = 64


@dataclass(frozen=True)
class _Pair:
    """One image to render: whose scene it shows, and whose scene its captions tell."""

    index: int
    split: str
    shown: int
    told: int


@dataclass(frozen=True)
class SynthSettings:
    """What is rendered.

    Attributes:
        images: How many; the last ones are `val`, then `test`, the others `train`.
        seed: Every scene is drawn from it and the image's index.
        size: Side of the square images, pixels.
        quality: Of the JPEGs.
        val: Images of that split; default a twelfth.
        test: Images of that split; default a twelfth.
        mispaired: Share of images whose captions belong to another image of their split.
        duplicates: Share of images that show another's scene anew, with captions of their own.
        ambiguity: Probability that a caption leaves so much out that it fits several scenes.
    """

    images: int
    seed: int = 0
    size: int = 96
    quality: int = 90
    val: int | None = None
    test: int | None = None
    mispaired: float = 0.0
    duplicates: float = 0.0
    ambiguity: float = 0.0

    @property
    def held_out(self) -> tuple[int, int]:
        """Images of `val` and of `test`."""
        twelfth = max(1, self.images // 12)
        return (
            twelfth if self.val is None else self.val,
            twelfth if self.test is None else self.test,
        )

    def check(self) -> None:
        """Refuse numbers that make no data set.

        Raises:
            ConfigError: They make none.
        """
        val, test = self.held_out
        if val < 0 or test < 0 or val + test >= self.images:
            raise ConfigError(
                f"images={self.images} leaves none for training beside val={val} and test={test}; "
                f"render at least {max(0, val) + max(0, test) + 1}"
            )
        if self.size < 32:
            raise ConfigError(
                f"size={self.size} is too small to tell shapes apart; give at least 32 pixels"
            )
        for name in ("mispaired", "duplicates", "ambiguity"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ConfigError(f"{name}={share} is not a share; give a number from 0 to 1")


def render(
    out: Path,
    settings: SynthSettings,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render captioned scenes into a folder in Flickr30k layout.

    Args:
        out: Folder that gets `images/`, `results_20130124.token` and `dataset_flickr30k.json`.
        settings: What is rendered.
        workers: Processes that render.
        progress: Called with images done and images in all.

    Raises:
        ConfigError: The numbers make no data set.
    """
    settings.check()
    folder = Path(out) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = _plan(settings)
    entries: list[dict[str, Any]] = []
    chunks = [pairs[start : start + _CHUNK] for start in range(0, settings.images, _CHUNK)]
    for batch in map_ordered(partial(_render_pairs, folder, settings), chunks, workers):
        entries += batch
        if progress:
            progress(len(entries), settings.images)
    _write_captions(Path(out), entries)


def image_name(seed: int, index: int) -> str:
    """A numeric file name like Flickr's, different for every index of a seed."""
    # The factor is prime to the modulus, so no two indices meet.
    return f"{1_000_000_000 + (index * 2_654_435_761 + seed * 40_503) % 9_000_000_000}.jpg"


def _plan(settings: SynthSettings) -> list[_Pair]:
    images, seed, (val, test) = settings.images, settings.seed, settings.held_out
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
        copies = draw.sample(
            members, min(round(settings.duplicates * len(members)), len(members) // 2)
        )
        originals = sorted(set(members) - set(copies))
        for copy in copies:
            shown[copy] = told[copy] = draw.choice(originals)
        draw = random.Random(f"mispaired/{seed}/{split}")
        wanted = round(settings.mispaired * len(members))
        wrong = draw.sample(members, _derangeable(wanted, len(members)))
        truth = [told[index] for index in wrong]
        for index, other in zip(wrong, truth[1:] + truth[:1], strict=True):
            told[index] = other
    return [_Pair(index, split_of[index], shown[index], told[index]) for index in range(images)]


def _derangeable(count: int, members: int) -> int:
    # One image alone has nobody to swap captions with.
    if members < 2 or count == 0:
        return 0
    return max(2, count)


def _render_pairs(
    folder: Path, settings: SynthSettings, pairs: Sequence[_Pair]
) -> list[dict[str, Any]]:
    return [_render_pair(folder, settings, pair) for pair in pairs]


def _render_pair(folder: Path, settings: SynthSettings, pair: _Pair) -> dict[str, Any]:
    """Write one image; its entry of the Karpathy file."""
    seed = settings.seed
    scene, told = draw_scene(seed, pair.shown), draw_scene(seed, pair.told)
    name = image_name(seed, pair.index)
    image = paint(scene, settings.size, settings.quality, (seed, pair.index))
    (folder / name).write_bytes(image)
    captions = describe_scene(told, f"{seed}/{pair.index}", settings.ambiguity)
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


CAPTIONS = 5
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def describe_scene(scene: Scene, draw_from: str, ambiguity: float = 0.0) -> list[str]:
    """Five different true captions, each with enough to know the scene among hundreds."""
    draw = random.Random(f"captions/{draw_from}")
    captions: list[str] = []
    plain, vague = list(_TEMPLATES), list(_VAGUE)
    draw.shuffle(plain)
    draw.shuffle(vague)
    while len(captions) < CAPTIONS:
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
