"""What a tower's features pass before a head: statistics fitted on given rows, then fixed."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Below this share of its mean, fp32 sums cannot tell a feature's deviation from rounding; below
# this share of the usual deviation it is a dead one, whose gradient a division would blow up.
CONSTANT = 1e-6
# Directions with less than this share of the largest variance are rounding, and are not blown up.
RANK_TOLERANCE = 1e-6


class Standardize(nn.Module):
    """Shifts and scales each feature to mean 0 and deviation 1; the identity until fitted."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, rows: Float[Tensor, "n f"]) -> None:
        """Keep each feature's mean and deviation; a constant or dead feature keeps deviation 1."""
        wide = rows.detach().cpu().double()
        mean = wide.mean(0)
        std = (wide - mean).pow(2).mean(0).sqrt()
        constant = std <= CONSTANT * torch.maximum(mean.abs(), std.pow(2).mean().sqrt())
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return ((wide - self.mean) / self.std).to(rows.dtype)


class Whiten(nn.Module):
    """Rotates and scales features to mean 0 and unit covariance; the identity until fitted.

    With the covariance C = U L U': `pca` is L^-1/2 U' (z), features by falling variance; `zca` is
    U L^-1/2 U', the whitening that changes the features least. C is shrunk first, (1 - s) C +
    s tr(C)/f I, so that few rows or dead directions are not blown up.

    Source: Kessy et al. 2018 (arXiv 1512.00809), table 1; shrinkage to the scaled identity as in
        Ledoit and Wolf 2004.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, kind: str, shrinkage: float):
        super().__init__()
        self.kind = kind
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    def fit(self, rows: Float[Tensor, "n f"]) -> None:
        """Keep the mean and the whitening matrix of these rows."""
        mean, values, vectors = principal_axes(rows)
        values = (1 - self.shrinkage) * values + self.shrinkage * values.mean()
        scale = values.rsqrt().where(values > RANK_TOLERANCE * values[0], values.new_zeros(()))
        matrix = scale[:, None] * vectors.T
        self.mean.copy_(mean)
        self.matrix.copy_(vectors @ matrix if self.kind == "zca" else matrix)

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return ((wide - self.mean) @ self.matrix.T).to(rows.dtype)


def to_unit_rms(rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
    """Each row divided by the root of its mean square; a row of zeros stays."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    square = wide.pow(2).mean(-1, keepdim=True)
    tiny = torch.finfo(wide.dtype).tiny
    return (wide * square.clamp(min=tiny).rsqrt()).to(rows.dtype)


def principal_axes(rows: Float[Tensor, "n f"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [f], variances [f] falling, and unit directions in columns [f f]; float64 on the CPU."""
    wide = rows.detach().cpu().double()
    mean = wide.mean(0)
    centred = wide - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(wide))
    # An eigenvector's sign is arbitrary: the largest entry is made positive on any machine.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return mean, values.flip(0).clamp(min=0), (vectors * signs).flip(1)
