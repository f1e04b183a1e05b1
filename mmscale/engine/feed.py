"""Batches onto the device: bytes travel, and become normalised numbers there."""

from dataclasses import replace

import torch
from torch import Tensor

from mmscale.contracts import Batch, InputSpec
from mmscale.data.transform import normalise
from mmscale.parallel.device import send


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
