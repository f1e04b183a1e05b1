"""Losses that are sums over rows, a strip of rows at a time: nothing holds a row's logits for long.

A strip's gradients are taken as soon as its logits are there, so that these are made once, and
held, with all that is derived from them, for one strip. What is kept for the backward is as large
as rows and columns. This serves whatever looks at all logits of a row together: orders, means and
weights. `tiles.py` is for InfoNCE, whose rows and columns are sums of one product.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.loss.contrast import Direction

# Logits of a strip: few enough for a CPU's caches, and so many that a GPU's launches are few.
CPU_LOGITS, ACCELERATOR_LOGITS = 1 << 20, 1 << 23

# Scalars.
Sums = tuple[Tensor, ...]


def sum_over_rows(
    sums: Callable[..., Sums], ways: Sequence[Direction], *numbers: Float[Tensor, "..."]
) -> Sums:
    """Sums over the rows of directions that have as many rows and columns as one another.

    Args:
        sums: From a `Contrast` for each direction, of the same rows, and the numbers: sums over
            these rows. The first may have a gradient, to rows, columns and numbers. What else has
            one must be among the numbers.
        ways: The directions.
        numbers: Scale, bias and the like.
    """
    rows, columns = len(ways[0].rows), len(ways[0].columns)
    on_cpu = ways[0].rows.device.type == "cpu"
    step = max(1, (CPU_LOGITS if on_cpu else ACCELERATOR_LOGITS) // columns)
    if step >= rows:
        return sums(*(way.contrast() for way in ways), *numbers)
    strips = [slice(start, start + step) for start in range(0, rows, step)]
    tensors = [tensor for way in ways for tensor in (way.rows, way.columns)]
    found: Sums = _SumOverRows.apply(sums, ways, strips, *tensors, *numbers)
    return found


class _SumOverRows(torch.autograd.Function):
    """Sums strip by strip, and the gradient of the first of them.

    The tensors are the rows and the columns of each direction, then the numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Callable[..., Sums],
        ways: Sequence[Direction],
        strips: list[slice],
        *tensors: Tensor,
    ) -> Sums:
        wanted = ctx.needs_input_grad[3:]
        ctx.gradients = [
            torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)
        ]
        totals: Sums = ()
        for strip in strips:
            # Of the rows these alone, of everything else all.
            whole = slice(None)
            places = [strip, whole] * len(ways) + [whole] * (len(tensors) - 2 * len(ways))
            leaves = [
                tensor.detach()[place].requires_grad_(w)
                for tensor, place, w in zip(tensors, places, wanted, strict=True)
            ]
            values, gradients = _strip(sums, [way.part(strip) for way in ways], leaves)
            totals = tuple(map(torch.add, totals, values)) if totals else values
            for total, place, gradient in zip(ctx.gradients, places, gradients, strict=True):
                if gradient is not None:
                    total[place] += gradient
        ctx.mark_non_differentiable(*totals[1:])
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(g if g is None else g * grad for g in ctx.gradients)


def _strip(
    sums: Callable[..., Sums], ways: Sequence[Direction], leaves: list[Tensor]
) -> tuple[Sums, list[Tensor | None]]:
    """A strip's sums, and the first one's gradient to each leaf that wants one.

    Everything else that is made for the strip is gone when this returns.
    """
    with torch.enable_grad():
        sides = zip(ways, leaves[::2], leaves[1::2], strict=False)
        contrasts = [replace(way, rows=rows, columns=cols).contrast() for way, rows, cols in sides]
        found = sums(*contrasts, *leaves[2 * len(ways) :])
    values = tuple(value.detach() for value in found)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not (wanted and found[0].requires_grad):
        return values, [None] * len(leaves)
    del contrasts
    taken = iter(torch.autograd.grad(found[0], wanted, allow_unused=True))
    return values, [next(taken) if leaf.requires_grad else None for leaf in leaves]
