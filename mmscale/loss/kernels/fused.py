"""InfoNCE's sums and SigLIP through the kernels: what the host allocates, launches and joins.

Memory beyond rows and gradients: a log-sum-exp for each column and block of rows, and one strip of
gradients to logits. No value goes to the host.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.config.loss import Precision
from mmscale.loss.contrast import Direction, wide
from mmscale.loss.kernels import logits as kernels
from mmscale.loss.product import product

# Rows, columns and dimensions of a block, and warps: for inputs of two bytes, and of four.
NARROW, FULL = (128, 128, 64, 8), (64, 64, 32, 4)
# Enough programs for the largest GPUs, also where rows are few.
PROGRAMS = 512
# Gradients to logits that are held at once: 32 MB in bf16, which stay in a GPU's cache.
STRIP_LOGITS = 1 << 24


class _Problem:
    """Rows and columns as the kernels read them."""

    def __init__(self, x: Tensor, y: Tensor, way: tuple[Tensor, Tensor, int], precision: Precision):
        self.precision = precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.x, self.y = (rows.detach().to(dtype).contiguous() for rows in (x, y))
        row_ids, column_ids, self.first_negative = way
        self.ids = row_ids.contiguous(), column_ids.contiguous()
        self.b, self.d = x.shape
        self.n = len(y)
        *blocks, self.warps = NARROW if precision == "bf16" else FULL
        self.bm, self.bn, self.bk = blocks
        self.row_blocks = triton.cdiv(self.b, self.bm)
        wanted = triton.cdiv(PROGRAMS, self.row_blocks)
        self.columns_of_a_split = self.bn * triton.cdiv(triton.cdiv(self.n, self.bn), wanted)
        self.splits = triton.cdiv(self.n, self.columns_of_a_split)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.b, self.n, self.d, self.first_negative

    @property
    def options(self) -> dict[str, Any]:
        return {
            "BM": self.bm,
            "BN": self.bn,
            "BK": self.bk,
            "PRECISION": "tf32" if self.precision == "tf32" else "ieee",
            "num_warps": self.warps,
        }

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def strips(self) -> Iterator[tuple[slice, Tensor, tuple[int, int]]]:
        """Columns of a strip, where its gradients go, and the grid of its blocks."""
        width = self.bn * max(1, STRIP_LOGITS // (self.b * self.bn))
        for first in range(0, self.n, width):
            size = min(width, self.n - first)
            out = self.x.new_empty(self.b, size)
            yield slice(first, first + size), out, (self.row_blocks, triton.cdiv(size, self.bn))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """To rows and columns, to be filled by `add`."""
        return torch.zeros_like(self.x, dtype=torch.float32), self.new(self.n, self.d)

    def add(self, gradients: tuple[Tensor, Tensor], strip: slice, weights: Tensor) -> None:
        """What the gradients to a strip's logits are to its rows and columns, without the scale."""
        gradients[0].add_(product(weights, self.y[strip], self.precision))
        gradients[1][strip] = product(weights.T, self.x, self.precision)


def sums_and_positives(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    *,
    column_ids: Int64[Tensor, " n"],
    first: int,
    precision: Precision,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"], Float[Tensor, " b"]]:
    """As `tiles.sums_and_positives`."""
    way = column_ids[first : first + len(rows)], column_ids, len(columns)
    found: tuple[Tensor, Tensor, Tensor] = _SoftmaxSums.apply(
        rows, columns, scale, way, precision, True
    )
    return found


def bank_sum(
    rows: Float[Tensor, "b d"],
    bank: Float[Tensor, "k d"],
    scale: Float[Tensor, "1"],
    *,
    ids: Int64[Tensor, " b"],
    bank_ids: Int64[Tensor, " k"],
    precision: Precision,
) -> Float[Tensor, " b"]:
    """As `tiles.bank_sum`."""
    total: Tensor = _SoftmaxSums.apply(
        rows, bank.detach(), scale, (ids, bank_ids, 0), precision, False
    )[0]
    return total


def siglip_sum(
    way: Direction, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"]
) -> Float[Tensor, ""]:
    """Sum over rows and columns of a direction of -log sigmoid(z logit)."""
    first_negative = len(way.columns) if way.first_negative is None else way.first_negative
    ids = way.ids, way.column_ids, first_negative
    total: Tensor = _SigmoidSum.apply(way.rows, way.columns, scale, bias, ids, way.precision)
    return total


class _SoftmaxSums(torch.autograd.Function):
    """Log-sum-exps of rows and, where `both`, of columns, and each row's mean positive logit."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        way: tuple[Tensor, Tensor, int],
        precision: Precision,
        both: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.problem, ctx.both = (p := _Problem(rows, columns, way, precision)), both
        s = wide(scale.detach())
        row_sums, positives, counts = p.new(3, p.splits, p.b)
        column_sums = p.new(p.row_blocks if both else 1, p.n)
        kernels.softmax_sums[p.row_blocks, p.splits](
            p.x, p.y, s, *p.ids, row_sums, positives, counts, column_sums,
            *p.sizes, p.columns_of_a_split, BOTH=both, **p.options,
        )  # fmt: skip
        row_sum = row_sums.logsumexp(0)
        column_sum = column_sums.logsumexp(0) if both else column_sums[0]
        count = counts.sum(0) if both else torch.ones_like(row_sum)
        positive = positives.sum(0) / count
        ctx.save_for_backward(rows, columns, scale, row_sum, column_sum, count)
        if not both:
            ctx.mark_non_differentiable(column_sum, positive)
        return row_sum, column_sum, positive

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_grad: Tensor, column_grad: Tensor, positive_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_sum, column_sum, count = ctx.saved_tensors
        p, s = ctx.problem, wide(scale.detach())
        grads = row_grad.contiguous(), column_grad.contiguous(), positive_grad / count
        gradients = p.gradients()
        for strip, out, grid in p.strips():
            kernels.softmax_gradient[grid](
                p.x, p.y, s, *p.ids, row_sum, column_sum, *grads, out,
                *p.sizes, strip.start, out.shape[1], BOTH=ctx.both, **p.options,
            )  # fmt: skip
            p.add(gradients, strip, out)
        return *_scaled(gradients, (rows, columns, scale), s), None, None, None


class _SigmoidSum(torch.autograd.Function):
    """Sum over all pairs of -log sigmoid(z (s x.y + bias))."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        way: tuple[Tensor, Tensor, int],
        precision: Precision,
    ) -> Tensor:
        ctx.problem = p = _Problem(rows, columns, way, precision)
        ctx.save_for_backward(rows, columns, scale, bias)
        row_sums = p.new(p.splits, p.b)
        kernels.sigmoid_sums[p.row_blocks, p.splits](
            p.x, p.y, wide(scale.detach()), wide(bias.detach()), *p.ids, row_sums,
            *p.sizes, p.columns_of_a_split, **p.options,
        )  # fmt: skip
        return row_sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias = ctx.saved_tensors
        p, s, shift = ctx.problem, wide(scale.detach()), wide(bias.detach())
        gradients, bias_grad = p.gradients(), p.new(1).zero_()
        for strip, out, grid in p.strips():
            row_grads = p.new(grid[1], p.b)
            kernels.sigmoid_gradient[grid](
                p.x, p.y, s, shift, *p.ids, grad, out, row_grads,
                *p.sizes, strip.start, out.shape[1], **p.options,
            )  # fmt: skip
            bias_grad += row_grads.sum()
            p.add(gradients, strip, out)
        scaled = _scaled(gradients, (rows, columns, scale), s)
        return *scaled, bias_grad.to(bias.dtype).view_as(bias), None, None


def _scaled(
    gradients: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor], s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to rows, columns and scale from those that lack the scale."""
    rows, columns, scale = inputs
    scale_grad = torch.dot(wide(rows).reshape(-1), gradients[0].reshape(-1))
    return (
        gradients[0].mul_(s).to(rows.dtype),
        gradients[1].mul_(s).to(columns.dtype),
        scale_grad.to(scale.dtype).view_as(scale),
    )
