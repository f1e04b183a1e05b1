"""What an image shows: things of a shape and a colour in a 3 x 3 grid, drawn from (seed, index)."""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

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


_SUPERSAMPLING = 2


def paint(scene: Scene, size: int, quality: int, noise: tuple[int, int]) -> bytes:
    """The scene as a JPEG; places, angles, tints and grain are drawn from `noise`."""
    draw = np.random.default_rng([part % 2**63 for part in noise])
    side = size * _SUPERSAMPLING
    tone = draw.integers(*TONES[scene.tone])
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
