"""Embeddings with a known fault, made without any code of the package."""

from collections.abc import Callable
from dataclasses import replace
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


def few_factors(num: int, width: int, seed: int) -> Pairs:
    """The spectrum of a trained `demo`: seven factors, an eighth 14 times weaker, a long tail."""
    rng = np.random.default_rng(seed)
    factors = [0.243, 0.203, 0.166, 0.156, 0.070, 0.062, 0.055]
    tail = 0.0039 * (np.arange(8, width + 1) / 8) ** -4.0
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    deviations = np.sqrt([*factors, *tail])
    meaning = rng.normal(size=(num, width)) * deviations
    sides = [meaning + 0.3 * rng.normal(size=(num, width)) * deviations for _ in range(2)]
    return as_pairs(*(side @ basis for side in sides))


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


def mispaired(make: Generator, share: float) -> Generator:
    """Some captions are exchanged among the images that they were taken from."""

    def made(num: int, width: int, seed: int) -> Pairs:
        pairs = make(num, width, seed)
        rng = np.random.default_rng(seed + 7)
        taken = rng.permutation(num)[: round(share * num)]
        text = pairs.text.clone()
        # One turn of a random order leaves no caption where it was.
        text[taken] = pairs.text[np.roll(taken, 1)]
        return replace(pairs, text=text)

    return made


def moved(make: Generator, move: Callable[[torch.Tensor], torch.Tensor]) -> Generator:
    """Captions in other rows."""

    def made(num: int, width: int, seed: int) -> Pairs:
        pairs = make(num, width, seed)
        return replace(pairs, text=move(pairs.text))

    return made


def blockwise(block: int, shift: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Each block of rows turned by `shift`."""
    return lambda rows: torch.cat([part.roll(shift, 0) for part in rows.split(block)])


def anisotropic(num: int, width: int, seed: int) -> Pairs:
    """A healthy space of random strength, noise, cone and spectrum; noise differs by row."""
    rng = np.random.default_rng(seed)
    rank = max(8, int(width * rng.choice([0.1, 0.25, 0.5, 1.0])))
    sizes = np.arange(1, rank + 1) ** -rng.uniform(0, 0.5)
    basis = np.linalg.qr(rng.normal(size=(width, rank)))[0].T
    meaning = _unit(rng.normal(size=(num, rank)) * sizes @ basis)
    noise, differs = rng.uniform(0.2, 2.0), rng.choice([0.0, 0.3, 0.6])
    sides = []
    for _ in range(2):
        own = noise * np.exp(differs * rng.normal(size=(num, 1))) * _noise(rng, num, width)
        cone = rng.choice([0.0, 0.7, 2.0]) * _unit(rng.normal(size=(1, width)))
        sides.append(meaning + own + cone)
    return as_pairs(*sides)


def low_rank(rank: int, noise: float, side: str = "both") -> Generator:
    """The meaning squeezed into `rank` directions, with a little noise in all."""

    def make(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(width, rank)))[0].T
        meaning = rng.normal(size=(num, rank))
        meaning /= np.sqrt(rank)
        sides = [meaning @ basis + noise * _noise(rng, num, width) for _ in range(2)]
        if side == "text":
            wide = healthy(0.5)(num, width, seed).image.numpy()
            sides[0] = 0.6 * _unit(sides[0]) + 0.8 * wide
        return as_pairs(*sides)

    return make


def with_features(make: Generator, paired: bool) -> Generator:
    """Towers' own features that share the images' content, in spaces of different width."""

    def made(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed + 2)
        content = rng.normal(size=(num, 24))
        views = []
        for features in (96, 80):
            view = content @ rng.normal(size=(24, features))
            views.append(np.maximum(view + 2 * rng.normal(size=view.shape), 0.0))
        if not paired:
            views[1] = rng.permutation(views[1])
        image, text = (torch.tensor(view, dtype=torch.float32) for view in views)
        return replace(make(num, width, seed), backbone_image=image, backbone_text=text)

    return made


def at_scale(make: Generator, scale: float) -> Generator:
    def made(num: int, width: int, seed: int) -> Pairs:
        return replace(make(num, width, seed), logit_scale=scale)

    return made


def sharp(num: int, width: int, seed: int) -> Pairs:
    """Hardly any noise: every pair is told apart."""
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(num, width))
    return as_pairs(*(meaning + 0.1 * rng.normal(size=(num, width)) for _ in range(2)))


def repeated(times: int) -> Generator:
    """Each image in several rows, one for each caption, and nobody says so."""

    def make(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        scenes = healthy(0.5)(-(-num // times), width, seed)
        rows = np.repeat(np.arange(-(-num // times)), times)[:num]
        captions = scenes.text.numpy()[rows] + 0.5 * _noise(rng, num, width)
        return as_pairs(scenes.image.numpy()[rows], captions)

    return make


def hubby(num: int, width: int, seed: int) -> Pairs:
    """Images share a common direction, to which captions lean more or less."""
    rng = np.random.default_rng(seed)
    common = _unit(rng.normal(size=(1, width)))
    meaning = _noise(rng, num, width)
    lean = np.exp(rng.normal(size=(num, 1)))
    images = meaning + 0.7 * _noise(rng, num, width) + 2.5 * common
    captions = meaning + 0.7 * _noise(rng, num, width) + lean * common
    return as_pairs(images, captions)


MODES: dict[str, tuple[str, Generator]] = {
    "healthy, little noise": ("healthy", healthy(0.2)),
    "healthy, some noise": ("healthy", healthy(0.7)),
    "healthy, much noise": ("healthy", healthy(1.2)),
    "healthy, narrow cone": ("healthy", healthy(0.7, cone=2.0)),
    "healthy, all directions": ("healthy", healthy(0.7, width_share=1.0, cone=0.0)),
    "healthy, scale at its limit": ("healthy", at_scale(weak, 100.0)),
    "healthy, scale as at the start": ("healthy", at_scale(healthy(0.7), 14.3)),
    "healthy, with features": ("healthy", with_features(healthy(0.7), True)),
    "weak but aligned": ("healthy", weak),
    "joint collapse, exact": ("complete_collapse", joint_collapse(0.0)),
    "joint collapse, a little left": ("complete_collapse", joint_collapse(0.1)),
    "dead image tower": ("dead_tower", dead("image")),
    "dead text tower": ("dead_tower", dead("text")),
    "nearly dead text tower": ("dead_tower", dead("text", 0.1)),
    "rank 5": ("dimensional_collapse", low_rank(5, 0.1)),
    "rank 8, noisy": ("dimensional_collapse", low_rank(8, 0.3)),
    "rank 5, text alone": ("dimensional_collapse", low_rank(5, 0.1, "text")),
    "unaligned": ("unaligned", isotropic),
    "rotated": ("unaligned", rotated),
    "unaligned, pairs right": ("unaligned", with_features(isotropic, True)),
    "shuffled, no features": ("shuffled_pairs", shuffled),
    "half of the pairs mixed": ("shuffled_pairs", mispaired(healthy(0.5), 0.5)),
    "most of the pairs mixed": ("shuffled_pairs", mispaired(healthy(0.5), 0.75)),
    "captions shifted": ("shuffled_pairs", moved(healthy(0.7), lambda text: text.roll(3, 0))),
    "captions shifted in shards": ("shuffled_pairs", moved(healthy(0.7), blockwise(32, 1))),
    "captions reversed": ("shuffled_pairs", moved(weak, lambda text: text.flip(0))),
    "shuffled": ("shuffled_pairs", with_features(shuffled, False)),
    "scale saturated": ("scale_saturated", at_scale(sharp, 100.0)),
    "scale stuck low": ("scale_stuck_low", at_scale(healthy(0.5), 1.0)),
    "five captions an image": ("false_negatives", repeated(5)),
    "hubs": ("hubness", hubby),
}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _noise(rng: np.random.Generator, num: int, width: int) -> np.ndarray:
    return _unit(rng.normal(size=(num, width)))
