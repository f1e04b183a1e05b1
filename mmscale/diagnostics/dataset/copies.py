"""Images that show the same picture: encoded anew, resized, mirrored, or cropped by a tenth.

Candidates are the nearest rows of low spatial frequencies, which such changes hardly touch. Each is
then laid over its neighbour: as it is and mirrored, whole and as windows of it. What counts is the
correlation of grey values at the best of them.
"""

import itertools
import math
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
_LEAST_ALIKE = 0.6
# Parts of a side that a crop may leave, and where the part lies: 0 at the beginning, 1 at the end.
_CROPS = (0.9, 0.95, 0.975)
_PLACES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Windows that are tried first: the whole, and of each side the beginning, the middle and the end.
_COARSE = (0, 1, 5, 9, 10, 14, 18)
# Correlation at those from which on all are tried.
_WORTH_A_CLOSE_LOOK = 0.8
_BATCH = 512
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
    for first, second in _candidates(greys, clear):
        known = zip(first.tolist(), second.tolist(), strict=True)
        scores = _laid_over(_blurred(greys[first]), _blurred(greys[second]))
        for pair, score in zip(known, scores.tolist(), strict=True):
            if score >= SAME:
                found[pair] = max(found.get(pair, 0.0), score)
    pairs = [Pair(first, second, score) for (first, second), score in found.items()]
    return sorted(pairs, key=lambda pair: (-pair.score, pair.first, pair.second))


def _equal(digests: list[bytes]) -> dict[tuple[int, int], float]:
    """Each copy with the first of its bytes."""
    first: dict[bytes, int] = {}
    pairs = ((first.setdefault(digest, row), row) for row, digest in enumerate(digests))
    return {pair: 1.0 for pair in pairs if pair[0] != pair[1]}


def _candidates(greys: np.ndarray, clear: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of pairs of rows that may be the same, each pair once, the lesser row first."""
    if len(clear) < 2:
        return []
    rows = _low_frequencies(greys[clear])
    # A mirrored picture has the sign of its odd frequencies across turned.
    signs = np.where(np.arange(_FREQUENCIES) % 2, -1.0, 1.0).astype(np.float32)
    turned = rows * np.tile(signs, _FREQUENCIES)
    places, cosines = nearest_rows(torch.from_numpy(np.concatenate([rows, turned])), _CANDIDATES)
    own = places[: len(clear)] % len(clear)
    asked = torch.arange(len(clear))[:, None].expand_as(own)
    near = (cosines[: len(clear)] >= _LEAST_ALIKE) & (own != asked)
    pairs = torch.stack([asked[near], own[near]], dim=1).sort(dim=1).values.unique(dim=0).numpy()
    return [
        (clear[part[:, 0]], clear[part[:, 1]])
        for part in (pairs[at : at + _BATCH] for at in range(0, len(pairs), _BATCH))
    ]


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
    blurred: np.ndarray = greys.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(blurred, [(0, 0), *((int(axis == other),) * 2 for other in (1, 2))], "edge")
        before, own, after = (padded.take(range(at, at + SIDE), axis) for at in range(3))
        blurred = (before + 2 * own + after) / 4
    return blurred


def _laid_over(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The best correlation of each pair over mirrored ones and windows of either."""
    best = np.full(len(first), -1.0, np.float32)
    mirrored = second[:, :, ::-1]
    for whole, cut in ((first, second), (first, mirrored), (second, first), (mirrored, first)):
        unit, grey = _evened(whole), cut
        score, down, across = _coarse(unit, grey)
        rows = np.flatnonzero(score >= _WORTH_A_CLOSE_LOOK)
        if len(rows):
            close = _close(unit[rows], grey[rows], down[rows], across[rows])
            score[rows] = np.maximum(score[rows], close)
        best = np.maximum(best, score)
    return best


def _coarse(unit: np.ndarray, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best of the coarse windows: its correlation, and its lines down and across."""
    score = np.full(len(unit), -1.0, np.float32)
    down, across = np.zeros(len(unit), np.int64), np.zeros(len(unit), np.int64)
    for row, column in itertools.product(_COARSE, repeat=2):
        there = _evened(_windows()[row] @ grey @ _windows()[column].T)
        found = (unit * there).sum(axis=(1, 2))
        better = found > score
        score[better], down[better], across[better] = found[better], row, column
    return score, down, across


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
    centred = greys - greys.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=(1, 2), keepdims=True))
    return centred / np.maximum(norm, 1e-6)


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
