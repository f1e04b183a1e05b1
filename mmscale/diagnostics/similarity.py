"""Similarities without rounding: equal rows give equal numbers, however the work is cut."""

from jaxtyping import Float, Float64
from torch import Tensor

# Unit rows on a grid of 2^-24: products are multiples of 2^-48 and every partial sum of a dot
# product is at most 1 in size (Cauchy-Schwarz), so float64 holds each exactly, in any order of
# summation, on any device. A plain fp32 product would differ in its last bit with the chunk it
# was computed in, and a tie would be won or lost by chance.
_GRID = 2.0**24


def on_grid(rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    """Unit rows as float64 whose dot products are exact; moves an entry by at most 3e-8."""
    return (rows.detach().double() * _GRID).round() / _GRID


def similarities(
    rows: Float[Tensor, "n d"], columns: Float[Tensor, "m d"]
) -> Float64[Tensor, "n m"]:
    """Cosine of every unit row with every unit column."""
    return on_grid(rows) @ on_grid(columns).T
