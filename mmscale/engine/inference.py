"""Calls of a model without an engine around it."""

from typing import Any

import torch
from torch import nn

from mmscale.parallel.device import DevicePolicy


class Inference:
    """A model in evaluation mode on its device, in the precision of the policy.

    Attributes:
        device: Where it computes.
        dtype: What its products are computed in.
    """

    def __init__(self, model: nn.Module, policy: DevicePolicy):
        self.device = policy.device
        self.dtype = policy.dtype
        self._model = model.to(policy.device)
        # An engine's own eval() gives nothing back.
        self._model.eval()

    @torch.no_grad()
    def call(self, mode: str, *inputs: Any) -> Any:
        """Forward without a graph."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            return self._model(mode, *inputs)
