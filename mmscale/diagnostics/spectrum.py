"""How many directions one tower's embeddings use, and how many they could at this size."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float64
from torch import Tensor

# RankMe's epsilon, as in the paper's equation 2.
_EPSILON = 1e-7
_QUADRATURE_NODES = 2000


def tower_figures(rows: Float64[Tensor, "n d"]) -> dict[str, float]:
    """Spread and effective dimensions of one tower's unit rows.

    Returns:
        `intra`: mean cosine of two different rows. `variance`: total variance, 1 - |mean|^2 of unit
        rows, 0 of equal ones. `std`: mean deviation of a coordinate. `rankme` and `rankme_ratio`:
        effective rank of the uncentred rows, and its share of what isotropic rows would have.
        `participation` and `nesum`: effective dimensions of the covariance; free of scale, so blind
        to a complete collapse, which `rankme` sees. `dims95`: directions that hold 95 % of the
        variance; `dims_possible`: how many there could be. `knee`: how many times one eigenvalue
        of the covariance exceeds the next where it breaks off, after `knee_at` directions;
        `condition`: largest over smallest eigenvalue; `slope`: minus the slope of ln eigenvalue
        over ln rank.

    Source: Garrido et al. 2023 (RankMe, eq. 2); He and Ozay 2022 (NESum, which is the stable rank
        of the centred rows); Agrawal et al. 2022 (alpha-ReQ: the slope, over ranks 11 to 100).
    """
    num, width = rows.shape
    mean = rows.mean(dim=0)
    squares = float(rows.square().sum())
    centred = rows - mean
    rank = rankme(rows)
    return {
        "intra": (num**2 * float(mean @ mean) - squares) / (num * (num - 1)),
        "variance": float(centred.square().sum()) / num,
        "std": float(rows.std(dim=0).mean()),
        "rankme": rank,
        "rankme_ratio": rank / isotropic_rankme(num, width),
        **_covariance_figures(centred),
    }


def rankme(rows: Float64[Tensor, "n d"]) -> float:
    """Exponential of the entropy of the normalised singular values, uncentred."""
    values = _squared_singular_values(rows).sqrt()
    if float(values.sum()) == 0.0:
        return 0.0
    shares = values / values.sum() + _EPSILON
    return math.exp(-float((shares * shares.log()).sum()))


@lru_cache(maxsize=64)
def isotropic_rankme(num: int, width: int) -> float:
    """RankMe that `num` independent isotropic rows of `width` would have.

    Integrates over the Marchenko-Pastur law of their squared singular values, so nothing is drawn.
    """
    smaller, larger = sorted((num, width))
    root = math.sqrt(smaller / larger)
    angles = (torch.arange(_QUADRATURE_NODES, dtype=torch.float64) + 0.5) * (
        math.pi / _QUADRATURE_NODES
    )
    squared = 1 + root * root + 2 * root * angles.cos()
    density = angles.sin().square() / squared
    density /= density.sum()
    values = squared.sqrt()
    mean = float((density * values).sum())
    log_mean = float((density * values * values.log()).sum())
    return smaller * math.exp(math.log(mean) - log_mean / mean)


def covariance_spectrum(rows: Float64[Tensor, "n d"]) -> Float64[Tensor, " r"]:
    """Eigenvalues of the rows' covariance, the largest first; they add up to the variance."""
    return _spread(rows - rows.mean(dim=0)) / len(rows)


def _spread(centred: Float64[Tensor, "n d"]) -> Float64[Tensor, " r"]:
    """Squared singular values of centred rows, the largest first."""
    # Centring takes one direction away, whose value is rounding.
    possible = min(centred.shape[0] - 1, centred.shape[1])
    return _squared_singular_values(centred).flip(0)[:possible]


def _covariance_figures(centred: Float64[Tensor, "n d"]) -> dict[str, float]:
    """What the covariance's eigenvalues say; zeros if there is no variance."""
    values = _spread(centred)
    possible = len(values)
    total = float(values.sum())
    # Below fp32's resolution of the rows the spectrum is that of rounding.
    if total <= 1e-14 * len(centred):
        names = ("participation", "nesum", "dims95", "knee", "knee_at", "condition", "slope")
        return dict.fromkeys(names, 0.0) | {"dims_possible": float(possible)}
    return {
        "participation": total**2 / float(values.square().sum()),
        "nesum": total / float(values[0]),
        "dims95": 1.0 + float((values.cumsum(0) < 0.95 * total).sum()),
        **_knee_figures(values),
        "dims_possible": float(possible),
        "condition": float(values[0] / values[-1].clamp(min=1e-300)),
        "slope": _slope(values),
    }


def _knee_figures(values: Float64[Tensor, " r"]) -> dict[str, float]:
    """The steepest step down that the first sixth of the directions ends with a seventh left."""
    if len(values) < 2:
        return {"knee": 1.0, "knee_at": 1.0}
    steps = max(1, len(values) // 6)
    left = 1 - values.cumsum(0)[:steps] / values.sum()
    ratios = values[:steps] / values[1 : steps + 1].clamp(min=1e-12 * float(values[0]))
    ratios = torch.where(left < 0.15, ratios, torch.ones_like(ratios))
    return {"knee": float(ratios.max()), "knee_at": float(ratios.argmax()) + 1}


def _slope(values: Float64[Tensor, " r"]) -> float:
    """Weighted least squares through ln eigenvalue over ln rank, each rank weighing 1 / rank."""
    if len(values) < 3:
        return 0.0
    last = min(100, len(values))
    first = min(10, last - 2)
    ranks = torch.arange(first + 1, last + 1, dtype=torch.float64)
    heights = values[first:last].clamp(min=1e-300).log()
    weights = (1 / ranks) / (1 / ranks).sum()
    places = ranks.log() - (weights * ranks.log()).sum()
    return -float((weights * places * heights).sum() / (weights * places.square()).sum())


def _squared_singular_values(rows: Float64[Tensor, "n d"]) -> Float64[Tensor, " r"]:
    """Eigenvalues of the smaller Gram matrix: tens of times faster than singular values."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp(min=0.0)
