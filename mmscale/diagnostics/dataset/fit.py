"""How well an image and its captions fit, against random pairings of the same images and captions.

Several figures see a pair: its cosine in a common space, that of its captions with what the
images near its image are captioned, and that of its image with what captions near its own show. A
logistic regression, trained to tell the set's pairs from random pairings, weighs them. Most pairs
are matched, and a mispaired one is a random pairing: no label is needed, and pairs are ordered as
by the ratio of the likelihoods, up to the linear form.

Sources:
    Gutmann and Hyvarinen 2010 ("Noise-contrastive estimation", AISTATS): a law learnt by telling it
    from a known one. Zhang et al. 2024 (LEMoN, arXiv 2407.18941, section 4): distances among
    neighbours in the other modality.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mmscale.diagnostics.dataset.held_out_map import (
    COARSE,
    FINE,
    Whitened,
    folds_of,
    held_out_rows,
)
from mmscale.diagnostics.dataset.neighbours import nearest_rows
from mmscale.diagnostics.mixture import standing, standing_rows

FEWEST_PAIRS = 200
# Random pairings drawn for each image.
_RANDOM = 5
_NEIGHBOURS = 30
# Weights of neighbours fall by e as the cosine falls by this.
_TEMPERATURE = 0.1
_ROUNDS = 30
_RIDGE = 1e-3


@dataclass(frozen=True)
class Fit:
    """What speaks for each pair.

    Attributes:
        own: Log odds that a pair is one of the set's and not a random pairing, up to a constant.
        random: The same of random pairings, for each image as many.
        deviates: The standing of each pair among the random ones, as normal deviates: of mispaired
            ones standard normal.
        weights: Of the figures, by name, in their deviations.
    """

    own: Float64[Tensor, " n"]
    random: Float64[Tensor, " m"]
    deviates: Float64[Tensor, " n"]
    weights: dict[str, float]


def fit_of_features(
    image: Float[Tensor, "n f"], text: Float[Tensor, "n g"], ids: Int64[Tensor, " n"]
) -> Fit:
    """Of towers that were never trained together: by maps that have not seen the pair.

    Args:
        image: Features of distinct images.
        text: Features of the captions of each; where it has several, their mean.
        ids: Of the images.
    """
    folds = folds_of(ids)
    others = _partners(folds)
    evened = Whitened(image), Whitened(text)
    figures = {}
    for name, shape in (("coarse", COARSE), ("fine", FINE)):
        own = torch.zeros(len(ids), dtype=torch.float64)
        random = torch.zeros(others.shape, dtype=torch.float64)
        sides = evened[0].by(shape.image), evened[1].by(shape.text)
        for part, left, right in held_out_rows(sides, folds, shape.power):
            place = torch.empty(len(ids), dtype=torch.int64)
            place[part] = torch.arange(len(part))
            own[part], random[part] = _cells(left, right, place[others[part]])
        figures[name] = own, random
    return _weighed(figures | _by_neighbours(image, text, others), others)


def fit_of_embeddings(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], ids: Int64[Tensor, " n"]
) -> Fit:
    """Of a model whose towers share a space."""
    others = _partners(folds_of(ids))
    return _weighed(
        {"cosine": _cells(image, text, others)} | _by_neighbours(image, text, others), others
    )


def _partners(folds: Int64[Tensor, " n"]) -> Int64[Tensor, "n r"]:
    """Random other rows of each row's fold."""
    draws = torch.Generator().manual_seed(1)
    others = torch.empty(len(folds), _RANDOM, dtype=torch.int64)
    for fold in range(int(folds.max()) + 1):
        rows = (folds == fold).nonzero()[:, 0]
        steps = torch.randint(1, max(2, len(rows)), (len(rows), _RANDOM), generator=draws)
        others[rows] = rows[(torch.arange(len(rows))[:, None] + steps) % len(rows)]
    return others


def _by_neighbours(
    image: Float[Tensor, "n f"], text: Float[Tensor, "n g"], others: Int64[Tensor, "n r"]
) -> dict[str, tuple[Float64[Tensor, " n"], Float64[Tensor, "n r"]]]:
    sides = [F.normalize(_centred(side), dim=1) for side in (image, text)]
    near = [_mean_of_near(side, other) for side, other in zip(sides, reversed(sides), strict=True)]
    return {
        "captions near": _cells(near[0], sides[1], others),
        "images near": _cells(sides[0], near[1], others),
    }


def _centred(rows: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
    unit = F.normalize(rows.float(), dim=1)
    return unit - unit.mean(dim=0)


def _mean_of_near(rows: Float[Tensor, "n f"], values: Float[Tensor, "n g"]) -> Float[Tensor, "n g"]:
    """For each row the mean of what belongs to its neighbours, near ones counting more."""
    places, cosines = nearest_rows(rows, _NEIGHBOURS)
    shares = torch.softmax(cosines / _TEMPERATURE, dim=1)
    means = torch.zeros_like(values)
    for place, share in zip(places.T, shares.T, strict=True):
        means += share[:, None] * values[place]
    return means


def _cells(
    left: Float[Tensor, "n d"] | Float64[Tensor, "n d"],
    right: Float[Tensor, "n d"] | Float64[Tensor, "n d"],
    others: Int64[Tensor, "n r"],
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "n r"]]:
    """Standing of each row's own cell, and of the cells with its random partners."""
    rows, columns = standing_rows(left, right)
    own = (rows * columns).sum(dim=1)
    random = [(rows * columns[other]).sum(dim=1) for other in others.T]
    return own, torch.stack(random, dim=1)


def _weighed(
    figures: dict[str, tuple[Float64[Tensor, " n"], Float64[Tensor, "n r"]]],
    others: Int64[Tensor, "n r"],
) -> Fit:
    own = torch.stack([pair for pair, _ in figures.values()], dim=1)
    random = torch.stack([cells.flatten() for _, cells in figures.values()], dim=1)
    # A figure that speaks against the set's own pairs does so by chance.
    weights = _logistic(own, random).clamp(min=0.0)
    if not weights.any():
        weights = torch.ones_like(weights)
    odds, chance = own @ weights, random @ weights
    named = dict(zip(figures, weights.tolist(), strict=True))
    return Fit(odds, chance, standing(odds, chance), named)


def _logistic(
    ours: Float64[Tensor, "n k"], theirs: Float64[Tensor, "m k"]
) -> Float64[Tensor, " k"]:
    """Weights that tell one from the other, both sets counting alike; Newton's method, ridge."""
    rows = torch.cat([ours, theirs])
    mean, deviation = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-12)
    rows = torch.cat([(rows - mean) / deviation, rows.new_ones(len(rows), 1)], dim=1)
    wanted = torch.cat([ours.new_ones(len(ours)), ours.new_zeros(len(theirs))])
    counts = torch.where(wanted > 0, 1 / len(ours), 1 / len(theirs))
    weights = rows.new_zeros(rows.shape[1])
    ridge = _RIDGE * torch.eye(len(weights), dtype=rows.dtype)
    for _ in range(_ROUNDS):
        sure = torch.sigmoid(rows @ weights)
        slope = rows.T @ (counts * (sure - wanted)) + ridge @ weights
        bend = (rows * (counts * sure * (1 - sure))[:, None]).T @ rows + ridge
        weights = weights - torch.linalg.solve(bend, slope)
    return weights[:-1] / deviation
