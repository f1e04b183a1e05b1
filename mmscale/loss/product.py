"""Products of rows and columns in the precision of `loss.precision`; their sums are fp32 in each.

What is rounded is what goes into a product, in the forward and in the backward. float64 is left
alone. A product of bf16 inputs that is summed in fp32 differs from the exact one of unit rows by at
most 2^-8: a logit by the scale times that.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.config.loss import Precision
from mmscale.errors import ConfigError


def require_precision(precision: Precision, device: torch.device) -> None:
    """See that the device computes in what the run asks for.

    Raises:
        ConfigError: TF32 off CUDA.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"loss.precision=tf32 needs a CUDA device, this is {device.type}; use fp32 or bf16"
        )


def product(
    a: Float[Tensor, "r k"], b: Float[Tensor, "k c"], precision: Precision
) -> Float[Tensor, "r c"]:
    """The matrix product; without a gradient of its own."""
    if precision == "bf16" and a.dtype != torch.float64:
        a, b = a.bfloat16(), b.bfloat16()
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()
    if precision == "tf32":
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
    return a @ b


def add_product(
    total: Float[Tensor, "r c"],
    a: Float[Tensor, "r k"],
    b: Float[Tensor, "k c"],
    precision: Precision,
) -> None:
    """Add the product to `total`, in place."""
    if precision == "fp32":
        total.addmm_(a, b)
    else:
        total.add_(product(a, b, precision))


def similarity(
    rows: Float[Tensor, "r d"], columns: Float[Tensor, "m d"], precision: Precision
) -> Float[Tensor, "r m"]:
    """Each row's product with each column; differentiable once."""
    found: Tensor = _Similarity.apply(rows, columns, precision)
    return found


class _Similarity(torch.autograd.Function):
    """The product, and those of its gradient, in one precision."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, precision: Precision) -> Tensor:
        ctx.precision = precision
        ctx.save_for_backward(rows, columns)
        return product(rows, columns.T, precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, columns = ctx.saved_tensors
        for_rows, for_columns, _ = ctx.needs_input_grad
        return (
            product(grad, columns, ctx.precision) if for_rows else None,
            product(grad.T, rows, ctx.precision) if for_columns else None,
            None,
        )
