"""Logits a tile at a time, and the sums over their rows and columns.

`x` are rows, `y` columns and `s` the scale, of one dtype; logits are s x_i.y_j.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# Large enough that threads seldom wait for one another and that a GPU's launches are few.
CPU_SIDE, ACCELERATOR_SIDE = 2048, 4096
# What a small batch may keep instead of computing it again: up to 4,096 x 4,096 in fp32.
KEPT_BYTES = 64 << 20
# fp32 has e^-87 to e^88. Between the highest exponent and the lowest sum, neither sums over 10^7
# columns overflow, nor their reciprocals times a gradient underflow, nor terms that matter.
_HIGHEST_EXPONENT, _LOWEST_SUM = 50.0, 1e-22


def shift_for(x: Float[Tensor, "b d"], y: Float[Tensor, "n d"], s: Float[Tensor, "1"]) -> float:
    """What brings the largest possible logit down to the highest exponent."""
    largest = s.abs() * x.norm(dim=1).amax() * y.norm(dim=1).amax()
    return max(0.0, float(largest) - _HIGHEST_EXPONENT)


def shifted_exp(tile: Float[Tensor, "r c"], shift: float) -> Float[Tensor, "r c"]:
    """exp(logit - shift), in place."""
    return (tile.sub_(shift) if shift else tile).exp_()


def shifted_sums(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "n d"],
    s: Float[Tensor, "1"],
    shift: float,
    kept: list[Tensor],
) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"]] | None:
    """Sums of exp(logit - shift) over rows and columns; None where the shift does not suit all.

    Appends the exponentials of the first tiles to `kept`.
    """
    row_sum, column_sum = x.new_zeros(len(x)), x.new_zeros(len(y))
    room = KEPT_BYTES
    for r, c, tile, _ in tiles(x, y, s):
        shifted_exp(tile, shift)
        row_sum[r] += tile.sum(1)
        column_sum[c] += tile.sum(0)
        room -= tile.nbytes
        if room >= 0:
            kept.append(tile.clone())
    # Not `<`: NaN must not pass.
    if not torch.minimum(row_sum.amin(), column_sum.amin()) >= _LOWEST_SUM:
        return None
    return row_sum, column_sum


def running_sums(
    x: Float[Tensor, "b d"], y: Float[Tensor, "n d"], s: Float[Tensor, "1"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"]]:
    """Log-sum-exps of rows and columns, whatever the logits."""
    row_sums, column_sums = RunningSums(x), RunningSums(y)
    for r, c, tile, work in tiles(x, y, s):
        row_sums.add(r, tile, work, 1)
        column_sums.add(c, tile, work, 0)
    return row_sums.value(), column_sums.value()


class RunningSums:
    """Log-sum-exps of rows or columns to which tiles are added."""

    def __init__(self, rows: Float[Tensor, "m d"]):
        # Lowest finite: a first tile of nothing but -inf must give -inf, not NaN.
        self._top = rows.new_full((len(rows),), torch.finfo(rows.dtype).min)
        self._sum = rows.new_zeros(len(rows))

    def add(self, part: slice, tile: Tensor, work: Tensor, dim: int) -> None:
        """Add a tile to the sums of `part`, over `dim`; overwrites `work`."""
        top, total = self._top[part], self._sum[part]
        new = torch.maximum(top, tile.amax(dim))
        total.mul_((top - new).exp_())
        torch.sub(tile, new.unsqueeze(dim), out=work)
        total.add_(work.exp_().sum(dim))
        top.copy_(new)

    def value(self) -> Float[Tensor, " m"]:
        return self._top + self._sum.log()


def tiles(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "n d"],
    s: Float[Tensor, "1"],
    ready: list[Tensor] | None = None,
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, columns, logits and a work tile of each place; the next overwrites both tiles.

    At the first places stand the tiles that are `ready`, instead of logits; they leave that list.
    """
    side = CPU_SIDE if x.device.type == "cpu" else ACCELERATOR_SIDE
    size = min(side, len(x)) * min(side, len(y))
    logits, work = x.new_empty(2, size)
    for r in _slices(len(x), side):
        scaled = x[r] * s
        for c in _slices(len(y), side):
            shape = (r.stop - r.start, c.stop - c.start)
            if ready:
                tile = ready.pop(0)
            else:
                out = logits[: shape[0] * shape[1]].view(shape)
                tile = torch.mm(scaled, y[c].T, out=out)
            yield r, c, tile, work[: tile.numel()].view(shape)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
