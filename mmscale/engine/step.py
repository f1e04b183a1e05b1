"""One update: rows to loss to gradient to weights, agreed on in one small reduction."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.contracts import (
    COMPONENTS,
    Batch,
    Embeddings,
    Engine,
    LossInput,
    LossOutput,
    Peers,
    StepRecord,
)
from mmscale.engine.gradient_cache import forward_backward
from mmscale.loss.objective import Objective


@dataclass(frozen=True)
class Update:
    """What `update` returns.

    Attributes:
        record: Figures of the global batch, equal on every rank.
        image: This rank's image embeddings, without a graph.
        text: This rank's caption embeddings, without a graph.
    """

    record: StepRecord
    image: Embeddings
    text: Embeddings


def update(
    engine: Engine,
    objective: Objective,
    peers: Peers,
    batch: Batch,
    micro_rows: int,
    lr: float,
    factor: float,
    step: int,
    stop: bool,
) -> Update:
    """Train on one batch.

    Args:
        engine: Holds the model.
        objective: Rows to loss.
        peers: All ranks, whatever the objective contrasts with.
        batch: This rank's rows, on the engine's device.
        micro_rows: Rows forwarded at once.
        lr: Base learning rate times `factor`, for the record.
        factor: Factor of every group's rate.
        step: Updates taken before this one.
        stop: This rank was told to stop.
    """
    scale = torch.zeros(1)

    def heads_and_loss(image: Tensor, text: Tensor) -> tuple[Embeddings, Embeddings, LossOutput]:
        nonlocal scale
        image_rows, text_rows, scale = engine.call("heads", image, text)
        return image_rows, text_rows, loss_of(image_rows, text_rows)

    def loss_of(image: Embeddings, text: Embeddings) -> LossOutput:
        labels = batch.labels
        return objective(LossInput(image, text, batch.match_ids, scale, step, labels))

    engine.open_window()
    if batch.mask is None:
        image, text, loss = heads_and_loss(batch.image, batch.tokens)
        engine.backward(loss.total, last=True)
    elif micro_rows < len(batch):
        image, text, loss = forward_backward(engine, batch, micro_rows, heads_and_loss)
    else:
        image, text, scale = engine.call("both", batch.image, batch.tokens, batch.mask)
        loss = loss_of(image, text)
        engine.backward(loss.total, last=True)
    record = _agree(engine, peers, batch, loss, lr, float(scale.detach()), stop)
    if record.applied:
        engine.apply(factor, record.grad_norm["total"])
    else:
        engine.discard()
    return Update(record, _detached(image), _detached(text))


def _agree(
    engine: Engine,
    peers: Peers,
    batch: Batch,
    loss: LossOutput,
    lr: float,
    scale: float,
    stop: bool,
) -> StepRecord:
    """The one small reduction: losses, norms, keys, damage and the wish to stop."""
    names = list(loss.terms)
    values = [loss.total.detach(), *loss.terms.values()]
    numbers = torch.cat(
        [
            torch.stack([value.double().cpu() for value in values]) / peers.size,
            engine.component_norms().double().cpu(),
            torch.tensor(_digest_parts(batch.keys), dtype=torch.float64),
            torch.tensor([float(len(batch.damaged)), float(stop)], dtype=torch.float64),
        ]
    )
    total, *rest = peers.total(numbers).tolist()
    terms, rest = dict(zip(names, rest, strict=False)), rest[len(names) :]
    squares, rest = rest[: len(COMPONENTS)], rest[len(COMPONENTS) :]
    parts, (damaged, stops) = rest[:4], rest[4:]
    norms = {name: math.sqrt(s) for name, s in zip(COMPONENTS, squares, strict=True) if s == s}
    norm = math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan
    return StepRecord(
        loss=total,
        terms=terms,
        lr=lr,
        logit_scale=scale,
        grad_norm={name: norms.get(name, math.nan) for name in COMPONENTS} | {"total": norm},
        keys_digest=_digest(parts),
        applied=math.isfinite(norm),
        damaged=int(damaged),
        stop=stops > 0,
    )


def _digest_parts(keys: list[str]) -> list[float]:
    """Sum of the keys' 64-bit hashes, cut into four so that float64 adds it exactly over ranks."""
    total = sum(
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys
    )
    total %= 2**64
    return [float(total >> (16 * part) & 0xFFFF) for part in range(4)]


def _digest(parts: list[float]) -> str:
    total = sum(int(part) << (16 * index) for index, part in enumerate(parts)) % 2**64
    return f"{total:016x}"


def _detached(rows: Embeddings) -> Embeddings:
    return Embeddings(rows.raw.detach(), rows.projected.detach(), rows.unit.detach())
