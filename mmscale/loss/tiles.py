"""Logits a tile at a time: sums over their rows and columns, and the gradients of these sums.

Nothing holds the logits: tiles, running sums, recomputation in backward. InfoNCE takes four
products of b x n x d: one forward for both directions, one again in backward, one for each
gradient. Memory beyond the rows and their gradients does not grow with n: two tiles, and those that
are kept for backward. Below, `x` are rows, `y` columns and `s` the scale, of one dtype; logits are
s x_i.y_j.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.config.loss import Precision
from mmscale.loss import kernels
from mmscale.loss.contrast import wide
from mmscale.loss.product import add_product, product

# Large enough that a CPU's threads seldom wait for one another and that a GPU's launches are few,
# and small enough that a tile stays in a GPU's cache.
CPU_SIDE, ACCELERATOR_SIDE = 2048, 2048
# What a small batch may keep instead of computing it again: up to 4,096 x 4,096 in fp32.
KEPT_BYTES = 64 << 20
# fp32 has e^-87 to e^88. Between the highest exponent and the lowest sum, neither sums over 10^7
# columns overflow, nor their reciprocals times a gradient underflow, nor terms that matter.
_HIGHEST_EXPONENT, _LOWEST_SUM = 50.0, 1e-22


def sums_and_positives(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    *,
    column_ids: Int64[Tensor, " n"],
    first: int,
    precision: Precision = "fp32",
) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"], Float[Tensor, " b"]]:
    """Log-sum-exp of each row's and of each column's logits, and each row's mean positive logit.

    Args:
        rows: This rank's.
        columns: Those of all ranks.
        scale: 1 / temperature.
        column_ids: Identity of each column; a row's positives are the columns of its own.
        first: Where this rank's rows begin among the columns.
        precision: Of the products of rows and columns.
    """
    if kernels.run_on(rows):
        from mmscale.loss.kernels import fused

        return fused.sums_and_positives(
            rows, columns, scale, column_ids=column_ids, first=first, precision=precision
        )
    sums: tuple[Tensor, Tensor, Tensor] = _SumsAndPositives.apply(
        rows, columns, scale, column_ids, first, precision
    )
    return sums


def bank_sum(
    rows: Float[Tensor, "b d"],
    bank: Float[Tensor, "k d"],
    scale: Float[Tensor, "1"],
    *,
    ids: Int64[Tensor, " b"],
    bank_ids: Int64[Tensor, " k"],
    precision: Precision = "fp32",
) -> Float[Tensor, " b"]:
    """Log-sum-exp of each row's logits with remembered columns; -inf where all are hidden.

    Hidden are columns of the row's own id, and empty slots (id -1). The columns have no gradient.
    """
    if kernels.run_on(rows):
        from mmscale.loss.kernels import fused

        return fused.bank_sum(rows, bank, scale, ids=ids, bank_ids=bank_ids, precision=precision)
    total: Tensor = _BankSum.apply(rows, bank, scale, ids, bank_ids, precision)
    return total


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
    precision: Precision = "fp32",
) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"]] | None:
    """Sums of exp(logit - shift) over rows and columns; None where the shift does not suit all.

    Appends the exponentials of the first tiles to `kept`.
    """
    row_sum, column_sum = x.new_zeros(len(x)), x.new_zeros(len(y))
    room = KEPT_BYTES
    for r, c, tile, _ in tiles(x, y, s, precision):
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
    x: Float[Tensor, "b d"], y: Float[Tensor, "n d"], s: Float[Tensor, "1"], precision: Precision
) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"]]:
    """Log-sum-exps of rows and columns, whatever the logits."""
    row_sums, column_sums = RunningSums(x), RunningSums(y)
    for r, c, tile, work in tiles(x, y, s, precision):
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
    precision: Precision,
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
                tile = (
                    torch.mm(scaled, y[c].T, out=out)
                    if precision == "fp32"
                    else out.copy_(product(scaled, y[c].T, precision))
                )
            yield r, c, tile, work[: tile.numel()].view(shape)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _SumsAndPositives(torch.autograd.Function):
    """Log-sum-exp of every row and of every column, and each row's mean positive logit.

    One exponential of a logit serves its row and its column as long as one shift suits all of
    them, as it does for unit rows at scales up to 100 but for rows that resemble nothing at all.
    Then row and column each have a shift, and an exponential, of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        column_ids: Tensor,
        first: int,
        precision: Precision,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y, s = _like(rows, columns, scale)
        ctx.shift, ctx.kept, ctx.precision, sums = 0.0, [], precision, None
        # Which shift suits is known to the host alone, for which an accelerator would have to wait.
        if x.device.type == "cpu":
            ctx.shift = shift_for(x, y, s)
            sums = shifted_sums(x, y, s, ctx.shift, ctx.kept, precision)
        if sums is None:
            ctx.shift, ctx.kept = None, []
            sums = logs = running_sums(x, y, s, precision)
        else:
            logs = sums[0].log() + ctx.shift, sums[1].log() + ctx.shift
        slots, counts = _slots(column_ids)
        row_slots = slots[first : first + len(x)]
        partners = _summed(y, slots, len(counts))[row_slots]
        positive = partners.mul_(x).sum(1) * s / counts[row_slots]
        ctx.save_for_backward(rows, columns, scale, slots, row_slots, counts, *sums)
        return *logs, positive

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_grad: Tensor, column_grad: Tensor, positive_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        rows, columns, scale, slots, row_slots, counts, row_sum, column_sum = ctx.saved_tensors
        x, y, s = _like(rows, columns, scale)
        weight = (positive_grad / counts[row_slots])[:, None]
        y_grad = _summed(x * weight, row_slots, len(counts))[slots]
        x_grad = _summed(y, slots, len(counts))[row_slots].mul_(weight)
        # None is left to another backward, which computes them all.
        num_kept = len(ctx.kept)
        if ctx.shift is not None:
            row_grad, column_grad = row_grad / row_sum, column_grad / column_sum
        for index, (r, c, tile, work) in enumerate(tiles(x, y, s, ctx.precision, ctx.kept)):
            if ctx.shift is None:
                torch.sub(tile, row_sum[r, None], out=work).exp_().mul_(row_grad[r, None])
                tile.sub_(column_sum[c]).exp_()
                torch.addcmul(work, tile, column_grad[c], out=tile)
            else:
                if index >= num_kept:
                    shifted_exp(tile, ctx.shift)
                tile.mul_(torch.add(row_grad[r, None], column_grad[c], out=work))
            add_product(x_grad[r], tile, y[c], ctx.precision)
            add_product(y_grad[c], tile.T, x[r], ctx.precision)
        scale_grad = _inner(x, x_grad)
        return (
            x_grad.mul_(s).to(rows.dtype),
            y_grad.mul_(s).to(columns.dtype),
            scale_grad.to(scale.dtype).view_as(scale),
            None,
            None,
            None,
        )


class _BankSum(torch.autograd.Function):
    """Log-sum-exp of every row over remembered columns; -inf where all are hidden."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bank: Tensor,
        scale: Tensor,
        ids: Tensor,
        bank_ids: Tensor,
        precision: Precision,
    ) -> Tensor:
        x, y, s = _like(rows, bank, scale)
        sums = RunningSums(x)
        for r, c, tile, work in tiles(x, y, s, precision):
            tile.masked_fill_(_hidden(ids[r], bank_ids[c]), -torch.inf)
            sums.add(r, tile, work, 1)
        total, ctx.precision = sums.value(), precision
        ctx.save_for_backward(rows, bank, scale, ids, bank_ids, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        rows, bank, scale, ids, bank_ids, total = ctx.saved_tensors
        x, y, s = _like(rows, bank, scale)
        # Where all is hidden the logits are -inf too, and -inf - -inf is NaN.
        total = total.clamp(min=torch.finfo(total.dtype).min)
        x_grad = torch.zeros_like(x)
        for r, c, tile, _ in tiles(x, y, s, ctx.precision):
            tile.masked_fill_(_hidden(ids[r], bank_ids[c]), -torch.inf)
            tile.sub_(total[r, None]).exp_().mul_(grad[r, None])
            add_product(x_grad[r], tile, y[c], ctx.precision)
        scale_grad = _inner(x, x_grad)
        return (
            x_grad.mul_(s).to(rows.dtype),
            None,
            scale_grad.to(scale.dtype).view_as(scale),
            None,
            None,
            None,
        )


def _hidden(ids: Int64[Tensor, " b"], bank_ids: Int64[Tensor, " k"]) -> Bool[Tensor, "b k"]:
    return (ids[:, None] == bank_ids) | (bank_ids < 0)


def _slots(ids: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """A number below n for each different id, and how many rows have it; of as many as rows.

    `unique` would give fewer numbers, but how many only the device knows.
    """
    ordered, order = ids.sort()
    begins = (ordered.diff() != 0).cumsum(0)
    slots = torch.zeros_like(ids).scatter_(0, order[1:], begins)
    return slots, torch.zeros_like(ids).scatter_add_(0, slots, torch.ones_like(ids))


def _summed(
    rows: Float[Tensor, "m d"], slots: Int64[Tensor, " m"], num_slots: int
) -> Float[Tensor, "slots d"]:
    return rows.new_zeros(num_slots, rows.shape[1]).index_add_(0, slots, rows)


def _inner(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _like(rows: Tensor, *others: Tensor) -> list[Tensor]:
    """Rows in fp32 or wider, and the others in the same dtype; without a graph."""
    widened = wide(rows.detach())
    return [widened, *(other.detach().to(widened.dtype) for other in others)]
