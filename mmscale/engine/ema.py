"""A second model that is the running mean of the trained one (EMA).

After each update w' <- m w' + (1 - m) w for every trained parameter and every statistic, in fp32:
in bf16 a step of 0.005 is lost to rounding. Where weights are whole on every rank (one device,
ZeRO 1 and 2) each rank keeps a whole copy, 4 bytes a trained parameter, and frozen parts are
shared with the trained model. ZeRO 3 and FSDP2 keep it in shards as they keep the model: 4 bytes a
parameter divided by the ranks, and no communication to follow.

Source: He et al. 2020, "Momentum Contrast" (arXiv 1911.05722), equation 2.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Replica:
    """A whole copy of a model whose weights are whole on every rank."""

    def __init__(self, module: nn.Module, trained: nn.Module, device: torch.device):
        """Start to follow.

        Args:
            module: What `copy_of` gave.
            trained: The engine's model.
            device: Where both compute.
        """
        self.module = module.to(device)
        ours, theirs = averaged(module, trained), averaged(trained, trained)
        self._pairs = [(ours[name], theirs[name]) for name in theirs]
        self._names = list(theirs)

    @torch.no_grad()
    def follow(self, share: float | Tensor) -> None:
        if isinstance(share, Tensor):
            for own, trained in self._pairs:
                own.lerp_(trained.to(own.dtype), share.to(own.dtype))
            return
        torch._foreach_lerp_([a for a, _ in self._pairs], [b for _, b in self._pairs], share)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, (own, _) in zip(self._names, self._pairs, strict=True):
            yield name, own.detach()

    def close(self) -> None:
        self._pairs = []


def copy_of(model: nn.Module, share_frozen: bool) -> nn.Module:
    """A model to follow `model` with, not trained itself.

    Args:
        model: Whole, before an engine takes it.
        share_frozen: Use the frozen parameters of `model` instead of copies.
    """
    frozen = {id(p): p for p in model.parameters() if share_frozen and not p.requires_grad}
    return copy.deepcopy(model, dict(frozen)).requires_grad_(False).eval()


def averaged(module: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """What of `module` is averaged: parameters that `trained` trains, and statistics, by name."""
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    kept = trained.state_dict().keys()
    weights = {name: p for name, p in module.named_parameters() if name in names}
    buffers = {name: b for name, b in module.named_buffers() if name in kept}
    return {**weights, **{name: b for name, b in buffers.items() if b.is_floating_point()}}
