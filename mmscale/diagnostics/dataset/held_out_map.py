"""What frozen towers say of pairs that no map has seen: cross-fitted canonical directions.

Features of two towers that were never trained together have no common space. A linear map makes
one, learnt from the pairs themselves; each pair is scored by a map that was learnt without it and
without others of its fold, so that a pair fits because pairs like it do.

Sources:
    Hotelling 1936 (canonical directions); Gong et al. 2014 (arXiv 1212.4522; weighted by their
    correlations); Chernozhukov et al. 2018 (arXiv 1608.00060; cross-fitting).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mmscale.model.heads import RANK_TOLERANCE, principal_axes

FOLDS = 10
# Rows that the axes of either side are taken from.
_LARGEST_SAMPLE = 2**16
_CHUNK = 2**14
# Squared singular values below this share of the largest are rounding.
_RESOLUTION = 1e-12


@dataclass(frozen=True)
class Map:
    """How strongly the directions of a side are evened out, and how correlations weigh them.

    Attributes:
        image: Shrinkage of the image side's covariance: its variances and `image` times their mean.
        text: That of the caption side.
        power: Exponent of a direction's correlation in its weight on either side.
    """

    image: float
    text: float
    power: float


# Of 5,999 photographs with MobileNetV2 and MiniLM the first orders the least likely pairs best,
# the second the others; together they are better than either.
COARSE = Map(image=1.0, text=0.1, power=0.5)
FINE = Map(image=0.3, text=0.3, power=1.0)


def folds_of(ids: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """A fold for each row, equal for rows of one image; as good as random, the same every time."""
    _, place = ids.unique(return_inverse=True)
    count = int(place.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (order % min(FOLDS, count))[place]


def held_out_rows(
    sides: tuple[Float[Tensor, "n f"], Float[Tensor, "n g"]],
    folds: Int64[Tensor, " n"],
    power: float,
) -> Iterator[tuple[Int64[Tensor, " m"], Float64[Tensor, "m d"], Float64[Tensor, "m d"]]]:
    """Unit rows in a common space, a fold at a time, by a map that was learnt from the others.

    Args:
        sides: Whitened features of images and captions; row i belongs to row i.
        folds: Of each row, from 0.
        power: Exponent of a direction's correlation in its weight.

    Yields:
        The rows of a fold, and their image and caption sides.
    """
    rows = [(folds == fold).nonzero()[:, 0] for fold in range(int(folds.max()) + 1)]
    parts = [_products(*(side[part] for side in sides)) for part in rows]
    total = torch.stack(parts).sum(dim=0)
    for part, products in zip(rows, parts, strict=True):
        left, right = _directions((total - products) / max(1, len(folds) - len(part)), power)
        yield (
            part,
            F.normalize(sides[0][part].double() @ left, dim=1),
            F.normalize(sides[1][part].double() @ right, dim=1),
        )


def _directions(
    cross: Float64[Tensor, "f g"], power: float
) -> tuple[Float64[Tensor, "f g"], Float64[Tensor, "g g"]]:
    """Singular directions of both sides, times their singular values to this power."""
    squares, right = torch.linalg.eigh(cross.T @ cross)
    kept = squares > _RESOLUTION * squares[-1].clamp(min=_RESOLUTION)
    values = squares.clamp(min=0.0).sqrt()
    weights = torch.where(kept, values**power, 0.0)
    # cross = left values right'
    scale = torch.where(kept, weights / values, 0.0)
    return cross @ (right * scale), right * weights


class Whitened:
    """Unit rows, centred, with variances evened out; it sees one side and so no pairing."""

    def __init__(self, rows: Float[Tensor, "n f"]):
        self._unit = F.normalize(rows.float(), dim=1)
        step = -(-len(rows) // _LARGEST_SAMPLE)
        self._mean, self._variances, self._axes = principal_axes(self._unit[::step])

    def by(self, shrinkage: float) -> Float[Tensor, "n f"]:
        """The rows in coordinates whose variances are v / (v + shrinkage x mean v)."""
        floor = RANK_TOLERANCE * self._variances[0]
        shrunk = self._variances + shrinkage * self._variances.mean()
        scale = shrunk.rsqrt().where(shrunk > floor, shrunk.new_zeros(()))
        return (self._unit - self._mean.float()) @ (self._axes * scale).float()


def _products(left: Float[Tensor, "n f"], right: Float[Tensor, "n g"]) -> Float64[Tensor, "f g"]:
    """Sum over rows of their outer products."""
    sums = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for rows, others in zip(left.split(_CHUNK), right.split(_CHUNK), strict=True):
        sums += (rows.T @ others).double()
    return sums
