"""Does either side know the other: a test of the pairing that needs no common space.

Rotating one tower's rows changes nothing here, shuffling them destroys everything; that tells
towers whose heads never met from pairs that were mixed up.
"""

import math

from jaxtyping import Float, Float64
from torch import Tensor

from mmscale.diagnostics.pairs import Pairs, one_to_one, second_captions

LARGEST_SAMPLE = 2048
FEWEST_PAIRS = 4

# Variance of the rows, as a share of their squared norms, below which there is only rounding.
_RESOLUTION = 1e-12


def pairing_figures(pairs: Pairs) -> dict[str, float]:
    """`health/cka` and `health/cka_z`; the same of the towers' own features, where they are given.

    Of these also `health/backbone_dims_image` and `_text` (participation ratio), their
    `health/backbone_spread_*` (share of the power that varies from row to row), and where images
    have two captions, `health/captions_cka`: whether those resemble each other.
    """
    sample = one_to_one(pairs, LARGEST_SAMPLE)
    sides = {
        "cka": (sample.image, sample.text),
        "backbone_cka": (sample.backbone_image, sample.backbone_text),
    }
    figures: dict[str, float] = {}
    if len(sample.image) < FEWEST_PAIRS:
        return figures
    for name, (image, text) in sides.items():
        if image is not None and text is not None:
            figures[f"health/{name}"], figures[f"health/{name}_z"] = cka(image, text)
    for side, rows in (("image", sample.backbone_image), ("text", sample.backbone_text)):
        if rows is not None:
            dims, spread = _dims_and_spread(rows)
            figures[f"health/backbone_dims_{side}"] = dims
            figures[f"health/backbone_spread_{side}"] = spread
    if (two := second_captions(pairs, LARGEST_SAMPLE)) is not None:
        figures["health/captions_cka"], figures["health/captions_cka_z"] = cka(*two)
    return figures


def noise_of(num: int | float) -> float:
    """Deviation of the CKA of `num` rows that are paired at random."""
    return math.sqrt(2 / (num * (num - 3)))


def _dims_and_spread(rows: Float[Tensor, "n f"]) -> tuple[float, float]:
    wide = rows.double()
    centred = wide - wide.mean(dim=0)
    power, varying = float(wide.square().sum()), float(centred.square().sum())
    if varying <= _RESOLUTION * power:
        return 0.0, 0.0
    return varying**2 / float((centred @ centred.T).square().sum()), varying / power


def cka(x: Float[Tensor, "n f"], y: Float[Tensor, "n g"]) -> tuple[float, float]:
    """Unbiased linear CKA of paired rows, and its z against pairing them at random.

    Both Gram matrices are U-centred: no diagonal, rows that sum to zero. Over random pairings the
    sum of their product then has mean 0 and, Mantel's moments collapsing, variance 2 |K|^2 |L|^2 /
    (n (n - 3)), so z = cka sqrt(n (n - 3) / 2): exact, without drawing permutations. Features of
    very low rank have a heavier upper tail than a normal deviate.

    Source: Song et al. 2012 (unbiased HSIC); Kornblith et al. 2019 (CKA); Mantel 1967.
    """
    num = len(x)
    grams = [_u_centred_gram(rows) for rows in (x, y)]
    norms = [float(gram.norm()) for gram in grams]
    if min(norms) == 0.0:
        return 0.0, 0.0
    value = float((grams[0] * grams[1]).sum()) / (norms[0] * norms[1])
    return value, value / noise_of(num)


def _u_centred_gram(rows: Float[Tensor, "n f"]) -> Float64[Tensor, "n n"]:
    """Zeros where the rows do not vary."""
    wide = rows.double()
    centred = wide - wide.mean(dim=0)
    gram = centred @ centred.T
    if float(gram.trace()) <= _RESOLUTION * float(wide.square().sum()):
        return gram.zero_()
    num = len(gram)
    gram.fill_diagonal_(0.0)
    sums = gram.sum(dim=1)
    gram -= (sums[:, None] + sums[None, :]) / (num - 2) - sums.sum() / ((num - 1) * (num - 2))
    return gram.fill_diagonal_(0.0)
