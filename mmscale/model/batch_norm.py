"""Batch normalisation over the rows of every rank; torch's SyncBatchNorm refuses a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.contracts import Peers

EPS = 1e-5
MOMENTUM = 0.1


class GlobalBatchNorm(nn.Module):
    """Normalises each feature by the statistics of the global batch, whatever its cut.

    It must see all of a rank's rows at once, and as many of them on every rank. `peers` comes from
    the run; without it the rows at hand are the batch. In evaluation, and for whoever calls a
    single row, the running statistics stand in: mean and unbiased variance, as torch's BatchNorm.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.peers: Peers | None = None

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.training:
            mean, variance = self._statistics(wide)
        else:
            mean, variance = self.running_mean, self.running_var
        normal = (wide - mean) * torch.rsqrt(variance + EPS)
        return (normal * self.weight + self.bias).to(rows.dtype)

    def _statistics(self, wide: Float[Tensor, "b f"]) -> tuple[Tensor, Tensor]:
        count = len(wide) * (self.peers.size if self.peers else 1)
        mean = self._total(wide.sum(0)) / count
        variance = self._total((wide - mean).pow(2).sum(0)) / count
        self._remember(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        return mean, variance

    def _total(self, value: Tensor) -> Tensor:
        return value if self.peers is None else self.peers.total(value)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        # A batch that is not finite is skipped by every rank and must leave no trace here either.
        finite = (mean + variance).isfinite().all()
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(torch.where(finite, new.to(running.dtype), running), MOMENTUM)


def connect_batch_norms(model: nn.Module, peers: Peers) -> None:
    """Let every batch normalisation of a model sum over these ranks."""
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            module.peers = peers
