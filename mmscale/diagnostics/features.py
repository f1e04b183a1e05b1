"""Features before they are made unit rows: is a tower alive, and are its numbers in a sane range.

All figures come from a few sums a dimension, so ranks exchange those instead of rows.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mmscale.contracts import Peers

# A dimension whose deviation is below this share of the median one carries nothing.
LOW_SHARE = 0.01

# Variance of a dimension, as a share of its mean square, below which there is only rounding.
_RESOLUTION = 1e-12


def feature_figures(
    rows: Float[Tensor, "b f"], peers: Peers, place: str, modality: str
) -> dict[str, float]:
    """What a tower or a head gives for the rows of all ranks. Collective.

    Args:
        rows: This rank's rows.
        peers: All ranks.
        place: `tower` or `head`: where the rows were taken.
        modality: `image` or `text`.

    Returns:
        Under `PLACE_NAME_MODALITY`: `mean` and `std` of all entries; `low` and `high`: the least
        and the greatest; `norm`: mean length of a row; `norm_spread`: deviation of the lengths, as
        a share of it; `spread`: mean variance of a dimension over rows, as a share of its mean
        square (0 where every row is the same); `low_dims`: dimensions whose deviation is under
        `LOW_SHARE` of the median one, all where that is zero.
    """
    total, square, low, high = _sums(rows, peers)
    count, norm, norm_square = (float(value) for value in total[-3:])
    mean, mean_square = total[:-3] / count, square / count
    variance = (mean_square - mean.square()).clamp(min=0.0)
    variance = torch.where(variance > _RESOLUTION * mean_square, variance, 0.0)
    deviation = variance.sqrt()
    middle = float(deviation.median())
    overall = float(mean_square.mean()) - float(mean.mean()) ** 2
    length = norm / count
    figures = {
        "mean": float(mean.mean()),
        "std": math.sqrt(max(0.0, overall)),
        "low": float(low),
        "high": float(high),
        "norm": length,
        "norm_spread": _ratio(math.sqrt(max(0.0, norm_square / count - length**2)), length),
        "spread": _ratio(float(variance.mean()), float(mean_square.mean())),
        "low_dims": float((deviation <= LOW_SHARE * middle).sum()),
    }
    return {f"{place}_{name}_{modality}": value for name, value in figures.items()}


def _sums(
    rows: Float[Tensor, "b f"], peers: Peers
) -> tuple[Float64[Tensor, " g"], Float64[Tensor, " f"], Tensor, Tensor]:
    """Over all ranks, in the order of the result.

    Returns:
        Sums of each dimension, then the number of rows, the sum of their lengths and that of the
        lengths' squares; sums of squares of each dimension; the least and the greatest entry.
    """
    wide = rows.detach().double()
    lengths = wide.norm(dim=1)
    width = wide.shape[1]
    mine = torch.cat(
        [
            wide.sum(dim=0),
            torch.stack([wide.new_tensor(len(wide)), lengths.sum(), lengths.square().sum()]),
            wide.square().sum(dim=0),
            torch.stack([wide.min(), wide.max()]),
        ]
    )
    ranks = peers.columns(mine[None]).cpu()
    total = ranks.sum(dim=0)
    return (
        total[: width + 3],
        total[width + 3 : 2 * width + 3],
        ranks[:, -2].amin(),
        ranks[:, -1].amax(),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
