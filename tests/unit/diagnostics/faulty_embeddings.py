"""Embeddings with a known fault, made without any code of the package."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmscale.diagnostics.pairs import Pairs

Generator = Callable[[int, int, int], Pairs]


def as_pairs(image: np.ndarray, text: np.ndarray) -> Pairs:
    ids = torch.arange(len(image))
    image_rows, text_rows = (
        torch.tensor(_unit(rows), dtype=torch.float32) for rows in (image, text)
    )
    return Pairs(image_rows, text_rows, ids, ids)


def load_features(folder: Path, name: str) -> Pairs:
    image, text = np.load(folder / "features" / name, allow_pickle=False).astype(np.float64)
    return as_pairs(image, text)


def healthy(noise: float, width_share: float = 0.25, cone: float = 0.7) -> Generator:
    """A shared meaning in some directions; each side has its own noise and common vector."""

    def make(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        rank = int(width * width_share)
        basis = np.linalg.qr(rng.normal(size=(width, rank)))[0].T
        meaning = _unit(rng.normal(size=(num, rank)) @ basis)
        sides = [
            meaning + noise * _noise(rng, num, width) + cone * _unit(rng.normal(size=(1, width)))
            for _ in range(2)
        ]
        return as_pairs(*sides)

    return make


def weak(num: int, width: int, seed: int) -> Pairs:
    """A partly trained model: the noise at which the AUC is 0.8."""
    rng = np.random.default_rng(seed)
    # Cosines of the noise deviate by 1 / sqrt(width); an AUC of 0.8 needs sqrt(2) * 0.84 of those.
    share = 1.19 / np.sqrt(width)
    meaning = _noise(rng, num, width)
    sides = [
        np.sqrt(share) * meaning + np.sqrt(1 - share) * _noise(rng, num, width) for _ in range(2)
    ]
    return as_pairs(*sides)


def joint_collapse(spread: float) -> Generator:
    def make(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        centre = _unit(rng.normal(size=(1, width)))
        return as_pairs(*(centre + spread * _noise(rng, num, width) for _ in range(2)))

    return make


def dead(side: str, spread: float = 0.0) -> Generator:
    def make(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        alive = healthy(0.5)(num, width, seed)
        constant = np.repeat(rng.normal(size=(1, width)), num, axis=0)
        constant = _unit(constant) + spread * _noise(rng, num, width)
        if side == "image":
            return as_pairs(constant, alive.text.numpy())
        return as_pairs(alive.image.numpy(), constant)

    return make


def isotropic(num: int, width: int, seed: int) -> Pairs:
    rng = np.random.default_rng(seed)
    return as_pairs(*(rng.normal(size=(num, width)) for _ in range(2)))


def rotated(num: int, width: int, seed: int) -> Pairs:
    pairs = healthy(0.5)(num, width, seed)
    rotation = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(width, width)))[0]
    return as_pairs(pairs.image.numpy(), pairs.text.numpy() @ rotation)


def shuffled(num: int, width: int, seed: int) -> Pairs:
    pairs = healthy(0.5)(num, width, seed)
    return as_pairs(
        pairs.image.numpy(), np.random.default_rng(seed + 1).permutation(pairs.text.numpy())
    )


MODES: dict[str, tuple[str, Generator]] = {
    "healthy, little noise": ("healthy", healthy(0.2)),
    "healthy, some noise": ("healthy", healthy(0.7)),
    "healthy, much noise": ("healthy", healthy(1.2)),
    "healthy, narrow cone": ("healthy", healthy(0.7, cone=2.0)),
    "healthy, all directions": ("healthy", healthy(0.7, width_share=1.0, cone=0.0)),
    "weak but aligned": ("healthy", weak),
    "joint collapse, exact": ("complete_collapse", joint_collapse(0.0)),
    "joint collapse, a little left": ("complete_collapse", joint_collapse(0.1)),
    "dead image tower": ("dead_tower", dead("image")),
    "dead text tower": ("dead_tower", dead("text")),
    "nearly dead text tower": ("dead_tower", dead("text", 0.1)),
    "unaligned": ("unaligned", isotropic),
    "rotated": ("unaligned", rotated),
    "shuffled": ("unaligned", shuffled),
}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _noise(rng: np.random.Generator, num: int, width: int) -> np.ndarray:
    return _unit(rng.normal(size=(num, width)))
