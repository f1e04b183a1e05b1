"""Fit the heads on features of the stream's first rows, before the first update."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmscale.contracts import Batch, InputSpec, Peers, Position
from mmscale.engine.inference import Inference, images_on
from mmscale.model.heads import Head


def fit_heads(
    model: Any,
    inference: Inference,
    stream: Any,
    peers: Peers,
    micro_rows: int,
    spec: InputSpec,
) -> None:
    """Fit each head that asks for it, equally on every rank. Collective.

    All ranks hold all rows, in the order that they have at any world size, and compute the same;
    rank 0's result is then taken everywhere, since machines may differ in the last digit.

    Args:
        model: A `TwoTower`; its batch normalisations are not connected to peers yet.
        inference: Calls it.
        stream: The training stream, whose first batches are looked at.
        peers: The ranks that hold the rows.
        micro_rows: Rows forwarded at once.
        spec: What the towers are fed.
    """
    heads = {name: head for name, head in model.head.items() if isinstance(head, Head)}
    wanted = max((head.fit_rows for head in heads.values()), default=0)
    if wanted == 0:
        return
    batches: Iterator[tuple[Batch, Position]] = stream.batches(Position())
    parts: dict[str, list[Tensor]] = {"image": [], "text": []}
    for _ in range(-(-wanted // stream.schedule.batch_rows)):
        features = _features(inference, next(batches)[0], micro_rows, spec)
        for name, rows in zip(parts, features, strict=True):
            parts[name].append(peers.columns(rows))
    del batches
    fitted = {name: head for name, head in heads.items() if head.fit_rows}
    wide = {name: _wide(torch.cat(parts[name]), inference.device) for name in fitted}
    if all(head.init == "cca" for head in fitted.values()):
        heads["image"].fit_with(heads["text"], wide["image"], wide["text"])
    else:
        for name, head in fitted.items():
            head.fit(wide[name])
    for head in fitted.values():
        for tensor in head.state_dict().values():
            tensor.copy_(peers.columns(tensor.detach().clone())[: len(tensor)])


def _wide(rows: Tensor, device: torch.device) -> Tensor:
    return rows.to(device, torch.promote_types(rows.dtype, torch.float32))


def _features(
    inference: Inference, batch: Batch, micro_rows: int, spec: InputSpec
) -> tuple[Tensor, Tensor]:
    if batch.mask is None:
        return batch.image.cpu(), batch.tokens.cpu()
    device, images, texts = inference.device, [], []
    for start in range(0, len(batch), micro_rows):
        rows = slice(start, start + micro_rows)
        tokens, mask = batch.tokens[rows].to(device), batch.mask[rows].to(device)
        images.append(inference.call("image", images_on(batch.image[rows], device, spec)).cpu())
        texts.append(inference.call("text", tokens, mask).cpu())
    return torch.cat(images), torch.cat(texts)
