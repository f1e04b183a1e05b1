"""What an image shows: things of a shape and a colour in a 3 x 3 grid, drawn from (seed, index)."""

import random
from dataclasses import dataclass

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
TONES = {"dark": (10, 45), "grey": (85, 120), "pale": (165, 195)}


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
    return Scene(tuple(sorted(things, key=lambda thing: not thing.large)), draw.choice(list(TONES)))
