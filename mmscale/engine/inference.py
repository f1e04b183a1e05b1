"""Batches onto the device, and calls of a model without an engine around it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.contracts import Batch, InputSpec
from mmscale.data.pixels import normalise
from mmscale.parallel.device import DevicePolicy, send


class Inference:
    """A model in evaluation mode on its device, in the precision of the policy."""

    def __init__(self, model: nn.Module, policy: DevicePolicy):
        self.device = policy.device
        self._dtype = policy.dtype
        self._model = model.to(policy.device)
        # An engine's own eval() gives nothing back.
        self._model.eval()

    @torch.no_grad()
    def call(self, mode: str, *inputs: Any) -> Any:
        """Forward without a graph."""
        enabled = self._dtype != torch.float32
        with torch.autocast(self.device.type, self._dtype, enabled=enabled):
            return self._model(mode, *inputs)


def on_device(batch: Batch, device: torch.device, spec: InputSpec) -> Batch:
    """The rows on `device`, their pixels normalised."""
    return replace(
        batch,
        image=images_on(batch.image, device, spec),
        tokens=send(batch.tokens, device),
        mask=None if batch.mask is None else send(batch.mask, device),
        image_ids=send(batch.image_ids, device),
        match_ids=send(batch.match_ids, device),
        labels=send(batch.labels, device),
    )


def images_on(images: Tensor, device: torch.device, spec: InputSpec) -> Tensor:
    """Pixels as towers take them; cached features as they are."""
    rows = send(images, device)
    return normalise(rows, spec) if rows.dtype == torch.uint8 else rows
