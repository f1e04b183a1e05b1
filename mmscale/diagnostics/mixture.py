"""Which share of the pairs belongs together: a mixture of matched and of mispaired ones.

How similar pairs are that do not belong together is known: every other cell of the same rows. A
pair's standing among them, as a normal deviate, is standard normal if it is mispaired. If it is
matched it is shifted up, by how much differs from pair to pair; nothing is assumed of that but that
the shifts have one mode. A second hump, at zero, is then the mispaired share. Where matched pairs
are so weak that one hump explains everything, the interval reaches to 1.

Sources:
    Patra and Sen 2016 ("Estimation of a two-component mixture model with applications to multiple
    testing", J. R. Stat. Soc. B 78, equation 1.1): one component known, the other not, and why the
    share is bounded from one side only without a condition on the other. Stephens 2017 ("False
    discovery rates: a new deal", Biostatistics 18, section 2): a point mass at zero beside a law
    with one mode, as a mixture of uniform ones; here the mode is not zero. Miller and Dunson 2019
    ("Robust Bayesian inference via coarsening", J. Am. Stat. Assoc. 114, section 2): the likelihood
    to a power that falls with the sample's size, for a model that is only nearly right.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mmscale.diagnostics.pairs import Pairs, one_to_one

LARGEST_SAMPLE = 4096
FEWEST_PAIRS = 64

# Below this share of mispaired pairs nobody is told: data sets have some, and so have outliers.
TOLERATED = 0.05

# Cells of other pairs that the standing is measured against.
_OTHERS = 2**16
_BINS = torch.linspace(-2.5, 4.0, 27, dtype=torch.float64)
# Shifts of matched pairs, where they may have their mode, and how much pairs of one shift differ:
# strong pairs differ less than mispaired ones do.
_SHIFTS = torch.linspace(-0.5, 5.0, 12, dtype=torch.float64)
_MODES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
_SPREADS = (0.6, 0.8, 1.0)
# Mispaired shares that are tried.
_ENDS = (0.0, 0.01, 0.02, 0.035, TOLERATED, 0.075)
_SHARES = torch.tensor(
    [*_ENDS, *(number / 20 for number in range(2, 19)), *(1 - end for end in reversed(_ENDS))],
    dtype=torch.float64,
)
# Rounds of expectation maximisation, and the power of each step: above 1 it takes fewer of them,
# below 2 the likelihood still rises.
_ROUNDS = 100
_POWER = 1.8
# Fall of the log likelihood at the ends of the interval. By a chi-squared law 1.9 would cover 95
# percent; counted, 3 does for spaces of every make.
_FALL = 3.0
# Pairs at which the likelihood counts half: beyond, the model's own error is larger than chance.
_COARSENESS = 2000.0


def mixture_figures(pairs: Pairs) -> dict[str, float]:
    """The share of captions that belong to their images: one of each, in turn.

    Returns:
        Under `health/`, nothing with fewer than `FEWEST_PAIRS`. Else `matched_share`;
        `matched_share_low` and `matched_share_high`, its 95 percent interval; `matched_z` and
        `mispaired_z`: signed roots of the likelihood ratios against no pair being matched, and
        against at most `TOLERATED` of them being mispaired: like normal deviates.
    """
    sample = one_to_one(pairs, LARGEST_SAMPLE, in_turn=True)
    if len(sample.image) < FEWEST_PAIRS:
        return {}
    rows, columns = standing_rows(sample.image, sample.text)
    own = (rows * columns).sum(dim=1)
    figures = share_figures(standing(own, other_cells(rows, columns)))
    return {f"health/{name}": value for name, value in figures.items()}


def standing(own: Float64[Tensor, " n"], others: Float64[Tensor, " m"]) -> Float64[Tensor, " n"]:
    """The normal deviate that leaves as many above it as a value leaves of the others."""
    ordered = others.sort().values
    place = torch.searchsorted(ordered, own, right=False) + torch.searchsorted(
        ordered, own, right=True
    )
    return torch.special.ndtri((place.double() / 2 + 0.5) / (len(ordered) + 1))


def share_figures(deviates: Float64[Tensor, " n"]) -> dict[str, float]:
    """`mixture_figures` of normal deviates, without `health/`."""
    counts = torch.bincount(torch.bucketize(deviates, _BINS, right=True), minlength=len(_BINS) + 1)
    likelihood = _profile(counts.double()) / (1 + len(deviates) / _COARSENESS)
    best = float(likelihood.max())
    low, high = _crossings(best - likelihood)
    few = float(likelihood[_SHARES <= TOLERATED].max())
    return {
        "matched_share": 1 - _peak(likelihood),
        "matched_share_low": 1 - high,
        "matched_share_high": 1 - low,
        "matched_z": math.sqrt(2 * max(0.0, best - float(likelihood[-1]))),
        "mispaired_z": math.sqrt(2 * max(0.0, best - few)),
    }


def other_cells(
    rows: Float64[Tensor, "n d"], columns: Float64[Tensor, "n d"]
) -> Float64[Tensor, " m"]:
    """Products off the diagonal, of each row as many; the same for the same rows."""
    num = len(rows)
    draws = torch.Generator().manual_seed(0)
    cells = []
    for _ in range(max(1, min(num - 1, _OTHERS // num))):
        steps = torch.randint(1, num, (num,), generator=draws)
        cells.append((rows * columns[(torch.arange(num) + steps) % num]).sum(dim=1))
    return torch.cat(cells)


def _profile(counts: Float64[Tensor, " b"]) -> Float64[Tensor, " g"]:
    """The greatest log likelihood at each mispaired share of `_SHARES`, over all shapes.

    The shape's weights are found by expectation maximisation, for all modes and shares at once.
    """
    shapes, null = _shapes(), _binned(torch.zeros(1, dtype=torch.float64), 1.0)[0]
    wrong = _SHARES[None, :, None]
    modes, parts, _ = shapes.shape
    weights = torch.full((modes, len(_SHARES), parts), 1 / parts, dtype=torch.float64)
    back = shapes.transpose(1, 2).contiguous()
    for _ in range(_ROUNDS):
        expected = wrong * null + (1 - wrong) * (weights @ shapes)
        weights = weights * ((counts / expected) @ back) ** _POWER
        weights = weights / weights.sum(dim=2, keepdim=True)
    expected = wrong * null + (1 - wrong) * (weights @ shapes)
    return torch.xlogy(counts, expected).sum(dim=2).amax(dim=0)


@lru_cache(maxsize=1)
def _shapes() -> Float64[Tensor, "m k b"]:
    """For each mode of the shifts, uniform laws from each shift to it, by the share in each bin."""
    shapes = []
    for spread in _SPREADS:
        cells = _binned(_SHIFTS, spread)
        for mode in torch.searchsorted(_SHIFTS, torch.tensor(_MODES).double()).tolist():
            ranges = (sorted((end, mode)) for end in range(len(cells)))
            shapes.append(torch.stack([cells[a : b + 1].mean(dim=0) for a, b in ranges]))
    return torch.stack(shapes)


def _binned(centres: Float64[Tensor, " k"], spread: float) -> Float64[Tensor, "k b"]:
    """Share of normal laws in each bin; the outermost bins are open."""
    below = torch.special.ndtr((_BINS[None, :] - centres[:, None]) / spread)
    ends = torch.zeros(len(centres), 1, dtype=torch.float64)
    return torch.cat([ends, below, ends + 1], dim=1).diff(dim=1)


def _crossings(fall: Float64[Tensor, " g"]) -> tuple[float, float]:
    """The least and the greatest share at which the profile has fallen by less than `_FALL`.

    Between two shares the root of the fall is nearly straight.
    """
    roots = fall.clamp(min=0.0).sqrt()
    within = (fall <= _FALL).nonzero()[:, 0]
    ends = []
    for inner, step in ((int(within[0]), -1), (int(within[-1]), 1)):
        outer = inner + step
        end = float(_SHARES[inner])
        if 0 <= outer < len(_SHARES):
            part = (math.sqrt(_FALL) - roots[inner]) / (roots[outer] - roots[inner])
            end += float(part * (_SHARES[outer] - _SHARES[inner]))
        ends.append(end)
    return ends[0], ends[1]


def _peak(likelihood: Float64[Tensor, " g"]) -> float:
    """Where the parabola through the greatest value and its neighbours has its top."""
    place = int(likelihood.argmax())
    if place in (0, len(_SHARES) - 1):
        return float(_SHARES[place])
    x, y = (part[place - 1 : place + 2].tolist() for part in (_SHARES, likelihood))
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = left - right
    if bend <= 0:
        return x[1]
    middle = (x[0] + x[1]) / 2 + left / bend * (x[2] - x[0]) / 2
    return min(max(middle, x[0]), x[2])


# Deviations of cosines below this are rounding of fp32 rows.
_RESOLUTION = 1e-8


def standing_rows(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "n d"]]:
    """Rows whose products are cosines without what each row and each column has in common.

    The product of image row i and text row j is their cosine, doubly centred and divided by the
    deviations of row i and column j, so that images with many similar captions and captions in
    everybody's neighbourhood stand out no sooner than others. Cells of pairs that do not belong
    together have mean 0 and deviation 1. A row that does not deviate becomes zeros.
    """
    sides = [rows.double() - rows.double().mean(dim=0) for rows in (image, text)]
    covariances = [rows.T @ rows / len(rows) for rows in sides]
    overall = float((covariances[0] * covariances[1]).sum().clamp(min=0.0).sqrt())
    standing = []
    for rows, others in zip(sides, reversed(covariances), strict=True):
        deviation = (rows @ others * rows).sum(dim=1, keepdim=True).clamp(min=0.0).sqrt()
        standing.append(torch.where(deviation > _RESOLUTION, rows / deviation, 0.0))
    return standing[0] * overall, standing[1]
