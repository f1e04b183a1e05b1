"""Images that show the same picture: encoded anew, resized, mirrored, or cropped by a tenth.

Candidates are the nearest rows of low spatial frequencies, which such changes hardly touch. Each is
laid over its neighbour, as it is and mirrored, whole and as windows of it: at eight grey values a
side first, and where they are alike at 32. What counts is the correlation at the best of them.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mmscale.diagnostics.dataset.neighbours import nearest_rows

SIDE = 32
# Correlation from which on two pictures are one. Of 80 photographs and 80 rendered scenes, encoded
# anew without a tenth of either side, one in a hundred stays below 0.983 and 0.973; among 500
# different photographs and scenes no two come above 0.952 and 0.971.
SAME = 0.973
_FREQUENCIES = 5
_CANDIDATES = 12
# Of low frequencies, below which no window fits.
_LEAST_ALIKE = 0.75
# Parts of a side that a crop may leave, and where the part lies: 0 at the beginning, 1 at the end.
_CROPS = (0.9, 0.95, 0.975)
_PLACES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Windows that are tried first: the whole, and of each side the beginning, the middle and the end.
_COARSE = (0, 1, 5, 9, 10, 14, 18)
# Grey values a side at which they are tried, and the correlation from which on all windows are: of
# 600 copies that count none stays below 0.964, of neighbours one in 200 is above 0.95.
_LOW = 8
_WORTH_A_CLOSE_LOOK = 0.95
_BATCH = 2048
# Deviation of grey values below which a picture has nothing to be recognised by.
_FLAT = 4.0


@dataclass(frozen=True)
class Pair:
    """Two rows that show the same picture, and how closely: 1 is the same grey values."""

    first: int
    second: int
    score: float


def same_pictures(greys: np.ndarray, digests: list[bytes]) -> list[Pair]:
    """Pairs of rows that show the same picture, the closest first.

    Args:
        greys: Thumbnails [n SIDE SIDE], uint8.
        digests: Of the images' bytes; equal ones are the same, whatever they show.
    """
    found = _equal(digests)
    clear = np.flatnonzero(greys.reshape(len(greys), -1).std(axis=1) >= _FLAT)
    for cut, whole, start in _alike(greys, _candidates(greys, clear)):
        scores = _laid_over(greys[cut], greys[whole], start)
        for pair, score in zip(np.sort(np.stack([cut, whole], 1), axis=1), scores, strict=True):
            if score >= SAME:
                key = int(pair[0]), int(pair[1])
                found[key] = max(found.get(key, 0.0), float(score))
    pairs = [Pair(first, second, score) for (first, second), score in found.items()]
    return sorted(pairs, key=lambda pair: (-pair.score, pair.first, pair.second))


def _equal(digests: list[bytes]) -> dict[tuple[int, int], float]:
    """Each copy with the first of its bytes."""
    first: dict[bytes, int] = {}
    pairs = ((first.setdefault(digest, row), row) for row, digest in enumerate(digests))
    return {pair: 1.0 for pair in pairs if pair[0] != pair[1]}


def _candidates(greys: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """Pairs of rows [p 2] that may be the same, each pair both ways, in the order of the first."""
    if len(clear) < 2:
        return np.zeros((0, 2), np.int64)
    rows = _low_frequencies(greys[clear])
    # A mirrored picture has the sign of its odd frequencies across turned.
    signs = np.where(np.arange(_FREQUENCIES) % 2, -1.0, 1.0).astype(np.float32)
    turned = rows * np.tile(signs, _FREQUENCIES)
    places, cosines = nearest_rows(torch.from_numpy(np.concatenate([rows, turned])), _CANDIDATES)
    own = places[: len(clear)] % len(clear)
    asked = torch.arange(len(clear))[:, None].expand_as(own)
    near = (cosines[: len(clear)] >= _LEAST_ALIKE) & (own != asked)
    pairs = torch.stack([asked[near], own[near]], dim=1)
    both = torch.cat([pairs, pairs.flip(1)]).unique(dim=0).numpy()
    return clear[both]


def _low_frequencies(greys: np.ndarray) -> np.ndarray:
    """Unit rows [n FREQUENCIES^2] of a cosine transform, without the mean."""
    steps = np.arange(SIDE) + 0.5
    waves = np.cos(math.pi / SIDE * np.arange(_FREQUENCIES)[:, None] * steps).astype(np.float32)
    rows = np.empty((len(greys), _FREQUENCIES**2), np.float32)
    for at in range(0, len(greys), 2**14):
        part = waves @ greys[at : at + 2**14].astype(np.float32) @ waves.T
        rows[at : at + 2**14] = part.reshape(len(part), -1)
    rows[:, 0] = 0.0
    return rows


def _blurred(greys: np.ndarray) -> np.ndarray:
    """Each pixel with its neighbours: a crop falls between pixels, and edges would not fit."""
    return _blur() @ greys.astype(np.float32) @ _blur().T


@cache
def _blur() -> np.ndarray:
    """A quarter of the pixels before and after, half of the own; the edge stands for what lacks."""
    steps = np.arange(SIDE)
    matrix = np.zeros((SIDE, SIDE), np.float32)
    for offset, share in ((-1, 0.25), (0, 0.5), (1, 0.25)):
        np.add.at(matrix, (steps, (steps + offset).clip(0, SIDE - 1)), share)
    return matrix


# Of pairs that are alike at few grey values: rows that are cut, rows that stay whole, and of each
# pair whether the whole one is mirrored, and which line down and which across cuts best.
Alike = tuple[np.ndarray, np.ndarray, np.ndarray]


def _alike(greys: np.ndarray, pairs: np.ndarray) -> Iterator[Alike]:
    """The pairs that are worth a close look, in batches; one way of each that comes up."""
    lines, count = np.array(_COARSE), len(_COARSE) ** 2
    sides = _coarse_sides(greys)
    for at in range(0, len(pairs), _BATCH):
        cut, whole = pairs[at : at + _BATCH].T
        first, begins = np.unique(cut, return_index=True)
        scores = np.empty((len(cut), 2, count), np.float32)
        ends = [*begins[1:], len(cut)]
        for windows, begin, end in zip(_coarse_windows(greys[first]), begins, ends, strict=True):
            scores[begin:end] = sides[whole[begin:end]] @ windows.T
        flat = scores.reshape(len(cut), -1)
        number = flat.argmax(axis=1)
        near = flat[np.arange(len(cut)), number] >= _WORTH_A_CLOSE_LOOK
        if near.any():
            mirrored, window = np.divmod(number[near], count)
            down, across = np.divmod(window, len(_COARSE))
            yield cut[near], whole[near], np.stack([mirrored, lines[down], lines[across]])


def _coarse_windows(greys: np.ndarray) -> np.ndarray:
    """Unit rows [n w LOW^2] of every coarse window down and across, at few grey values a side."""
    lines = _coarse_lines().reshape(-1, SIDE)
    num, count = len(greys), len(_COARSE)
    cut = lines @ greys.astype(np.float32) @ lines.T
    cut = cut.reshape(num, count, _LOW, count, _LOW).transpose(0, 1, 3, 2, 4)
    return _unit(cut.reshape(num, count * count, _LOW * _LOW))


def _coarse_sides(greys: np.ndarray) -> np.ndarray:
    """Unit rows [n 2 LOW^2] of whole pictures and of mirrored ones."""
    line = _coarse_lines()[0]
    small = np.empty((len(greys), 2, _LOW, _LOW), np.float32)
    for at in range(0, len(greys), 2**14):
        small[at : at + 2**14, 0] = line @ greys[at : at + 2**14].astype(np.float32) @ line.T
    small[:, 1] = small[:, 0, :, ::-1]
    return _unit(small.reshape(len(greys), 2, -1))


@cache
def _coarse_lines() -> np.ndarray:
    """Matrices [w LOW SIDE]: the coarse windows of a blurred line, its values averaged."""
    averaged = np.kron(np.eye(_LOW), np.full((1, SIDE // _LOW), _LOW / SIDE)).astype(np.float32)
    return averaged @ _windows()[list(_COARSE)] @ _blur()


def _unit(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    return centred / np.maximum(norm, 1e-6)


def _laid_over(cut: np.ndarray, whole: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The best correlation of each pair over the windows around one.

    Args:
        cut: Grey values [p SIDE SIDE] of those that are cut.
        whole: Of those that are not.
        start: For each [3 p] whether the whole one is mirrored, and the lines down and across.
    """
    mirrored, down, across = start
    turned = np.where(mirrored[:, None, None] == 1, whole[:, :, ::-1], whole)
    return _close(_evened(_blurred(turned)), _blurred(cut), down.copy(), across.copy())


def _close(unit: np.ndarray, grey: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The best correlation of all windows, along one side at a time."""
    score = np.full(len(unit), -1.0, np.float32)
    lines = _windows()
    for is_down in (True, False, True):
        held = grey @ lines[across].transpose(0, 2, 1) if is_down else lines[down] @ grey
        for number, line in enumerate(lines):
            there = _evened(line @ held if is_down else held @ line.T)
            found = (unit * there).sum(axis=(1, 2))
            better = found > score
            score[better] = found[better]
            (down if is_down else across)[better] = number
    return score


def _evened(greys: np.ndarray) -> np.ndarray:
    return _unit(greys.reshape(len(greys), -1)).reshape(greys.shape)


@cache
def _windows() -> np.ndarray:
    """Matrices [w SIDE SIDE] that enlarge a part of a line to its whole, between pixels linearly.

    The first is the whole line.
    """
    parts = [(1.0, 0.0), *itertools.product(_CROPS, _PLACES)]
    found = []
    for size, place in parts:
        centres = (np.arange(SIDE) + 0.5) * size + place * (1 - size) * SIDE - 0.5
        distance = np.abs(centres.clip(0, SIDE - 1)[:, None] - np.arange(SIDE))
        found.append((1 - distance).clip(0).astype(np.float32))
    return np.stack(found)


def groups_of(num: int, pairs: list[Pair]) -> list[int]:
    """For each row a number, equal for rows that pairs connect."""
    parent = list(range(num))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for pair in pairs:
        low, high = sorted((root(pair.first), root(pair.second)))
        parent[high] = low
    return [root(row) for row in range(num)]


def false_negative_rate(sizes: list[int], batch: int) -> float:
    """Share of a batch's rows that are expected to meet a copy of their image in it.

    Batches are drawn without replacement, so a row of a group of g among n images misses all of its
    g - 1 copies with the chance C(n - g, batch - 1) / C(n - 1, batch - 1).

    Args:
        sizes: Of the groups of images, single ones too.
        batch: Images of a global batch.
    """
    num = sum(sizes)
    batch = min(batch, num)
    met = 0.0
    for size in sizes:
        missed = 1.0
        for copy in range(size - 1):
            missed *= max(0, num - batch - copy) / (num - 1 - copy)
        met += size * (1 - missed)
    return met / num if num else 0.0
