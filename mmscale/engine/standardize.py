"""Fit the heads' input statistics on the first rows of the stream, before the first update."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmscale.contracts import Batch, Peers, Position
from mmscale.engine.inference import Inference


def fit_heads(model: Any, inference: Inference, stream: Any, peers: Peers, rows: int) -> None:
    """Set each head's mean and deviation, equal on every rank. Collective.

    Args:
        model: A `TwoTower`; its heads get the statistics.
        inference: Calls it.
        stream: The training stream, whose first batches are looked at.
        peers: The ranks that hold the rows.
        rows: Rows over all ranks that are at least looked at.
    """
    batches: Iterator[tuple[Batch, Position]] = stream.batches(Position())
    count = -(-rows // stream.schedule.batch_rows)
    images, texts = [], []
    for _ in range(count):
        image, text = _features(inference, next(batches)[0])
        images.append(image)
        texts.append(text)
    del batches
    for head, features in ((model.head["image"], images), (model.head["text"], texts)):
        mean, std = _moments(torch.cat(features), peers)
        head.set_statistics(mean, std)


def _features(inference: Inference, batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.mask is None:
        return batch.image, batch.tokens
    device = inference.device
    image = inference.call("image", batch.image.to(device))
    text = inference.call("text", batch.tokens.to(device), batch.mask.to(device))
    return image.cpu(), text.cpu()


def _moments(features: Tensor, peers: Peers) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over all ranks' rows, in float64."""
    wide = features.double()
    count = len(wide) * peers.size
    mean = peers.total(wide.sum(0)) / count
    variance = peers.total((wide - mean).pow(2).sum(0)) / count
    return mean, variance.sqrt()
