"""True captions of scenes: exact ones, and vague ones that fit several scenes."""

import random
from collections.abc import Callable, Sequence

from mmscale.data.scenes import Scene, Thing

CAPTIONS = 5
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def describe(scene: Scene, draw_from: str, ambiguity: float = 0.0) -> list[str]:
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
