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
        to a complete collapse, which `rankme` sees.

    Source: Garrido et al. 2023 (RankMe, eq. 2); He and Ozay 2022 (NESum, which is the stable rank
    of
        the centred rows).
    """
    num, width = rows.shape
    mean = rows.mean(dim=0)
    squares = float(rows.square().sum())
    centred = rows - mean
    rank = rankme(rows)
    participation, nesum = _effective_dimensions(centred)
    return {
        "intra": (num**2 * float(mean @ mean) - squares) / (num * (num - 1)),
        "variance": float(centred.square().sum()) / num,
        "std": float(rows.std(dim=0).mean()),
        "rankme": rank,
        "rankme_ratio": rank / isotropic_rankme(num, width),
        "participation": participation,
        "nesum": nesum,
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


def _effective_dimensions(centred: Float64[Tensor, "n d"]) -> tuple[float, float]:
    """Participation ratio and NESum of the covariance; zeros if there is no variance."""
    values = _squared_singular_values(centred)
    total = float(values.sum())
    # Below fp32's resolution of the rows the spectrum is that of rounding.
    if total <= 1e-14 * len(centred):
        return 0.0, 0.0
    return total**2 / float(values.square().sum()), total / float(values.max())


def _squared_singular_values(rows: Float64[Tensor, "n d"]) -> Float64[Tensor, " r"]:
    """Eigenvalues of the smaller Gram matrix: tens of times faster than singular values."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp(min=0.0)
