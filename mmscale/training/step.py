"""One update: rows to loss to gradient to weights, agreed on in one small reduction."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmscale.contracts import (
    COMPONENTS,
    KINDS,
    PARTS,
    Batch,
    Embeddings,
    Features,
    LossInput,
    LossOutput,
    Peers,
    StepRecord,
)
from mmscale.engine.gradient_cache import StepOutput, encode_rows, forward_backward
from mmscale.engine.protocol import Engine
from mmscale.loss.objective import Objective
from mmscale.parallel.phases import phase
from mmscale.training.part import Part, Step, StepResult


@dataclass(frozen=True)
class Learner:
    """What computes an update and applies it.

    Attributes:
        engine: Holds the model.
        objective: Rows to loss.
        peers: All ranks, whatever the objective contrasts with.
        micro_rows: Rows forwarded at once.
    """

    engine: Engine
    objective: Objective
    peers: Peers
    micro_rows: int


def train_step(
    learner: Learner, batch: Batch, step: Step, parts: Sequence[Part] = ()
) -> StepResult:
    """Train on one batch. Collective.

    Args:
        learner: Model, objective and ranks.
        batch: This rank's rows, on the engine's device.
        step: Which update, and its rates.
        parts: What the update uses besides the model, in an order equal on all ranks.
    """
    engine = learner.engine
    scale_module: Any = engine.module.get_submodule("scale")
    scale_module.begin(step.number)
    for part in parts:
        part.before(step, batch)

    def compute_loss(features: Features) -> StepOutput:
        with phase("loss"):
            image, text, scale, bias = engine.call("heads", features.image, features.text)
            rows = LossInput(
                image=image,
                text=text,
                ids=batch.match_ids,
                scale=scale,
                bias=bias,
                step=step.number,
                is_logged=step.is_measured,
                labels=batch.labels,
            )
            for part in parts:
                rows = part.inputs(rows, features, batch)
            return StepOutput(rows, learner.objective(rows))

    sequences = any(part.reads_tokens for part in parts)
    output = _gradients(engine, batch, learner.micro_rows, sequences, compute_loss)
    record = _agree(learner, batch, output, step)
    rows = _detached(output.rows)
    if record.applied:
        with phase("optimizer"):
            engine.apply(step.factor, record.grad_norm["total"])
        for part in parts:
            part.follow(rows, batch)
    else:
        engine.skip_update()
    return StepResult(record, rows, batch)


def _gradients(
    engine: Engine,
    batch: Batch,
    micro_rows: int,
    sequences: bool,
    compute_loss: Callable[[Features], StepOutput],
) -> StepOutput:
    """Forward and backward of the whole batch, in chunks where it does not fit."""
    engine.begin_update()
    if batch.mask is not None and micro_rows < len(batch):
        return forward_backward(engine, batch, micro_rows, sequences, compute_loss)
    features = (
        Features(batch.image, batch.tokens)
        if batch.mask is None
        else encode_rows(engine, batch, slice(None), sequences)
    )
    output = compute_loss(features)
    with phase("backward"):
        engine.backward(output.loss.total, last=True)
    return output


def _agree(learner: Learner, batch: Batch, output: StepOutput, step: Step) -> StepRecord:
    """The one small reduction: losses, norms, keys, damage, and what this rank says.

    That is its wish to stop, and that it has written its part of a checkpoint.
    """
    loss, peers = output.loss, learner.peers
    scale = float(output.rows.scale.detach())
    names = list(loss.terms)
    said = (len(batch.damaged), batch.cut, _tokens(batch), step.stop, step.written)
    numbers = torch.cat(
        [
            _stacked(loss) / peers.size,
            _part_norms(learner.engine),
            torch.tensor(_digest_parts(batch.keys), dtype=torch.float64),
            torch.tensor([float(value) for value in said], dtype=torch.float64),
        ]
    )
    total, *rest = peers.total(numbers).tolist()
    terms, rest = dict(zip(names, rest, strict=False)), rest[len(names) :]
    squares, rest = dict(zip(PARTS, rest, strict=False)), rest[len(PARTS) :]
    parts, (damaged, cut, tokens, stops, written) = rest[:4], rest[4:]
    whole = {name: _norm(squares[f"{name}_{kind}"] for kind in KINDS) for name in COMPONENTS} | {
        "total": _norm(squares.values())
    }
    return StepRecord(
        loss=total,
        terms=terms,
        lr=step.lr,
        logit_scale=scale,
        grad_norm=whole,
        grad_norm_parts={name: _norm([square]) for name, square in squares.items()},
        keys_digest=_digest(parts),
        applied=math.isfinite(whole["total"]) and math.isfinite(total),
        damaged=int(damaged),
        cut=int(cut),
        tokens=int(tokens),
        stop=stops > 0,
        written=written == peers.size,
    )


def _stacked(loss: LossOutput) -> Tensor:
    values = [loss.total.detach(), *loss.terms.values()]
    return torch.stack([value.double().cpu() for value in values])


def _part_norms(engine: Engine) -> Tensor:
    with phase("optimizer"):
        return engine.part_norms().double().cpu()


def _tokens(batch: Batch) -> int:
    """Real tokens that go through the text tower."""
    return 0 if batch.mask is None else int(batch.mask.sum())


def _norm(squares: Iterable[float]) -> float:
    """NaN where a gradient is not finite."""
    total = sum(squares)
    return math.sqrt(total) if math.isfinite(total) else math.nan


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


def _detached(rows: LossInput) -> LossInput:
    """What parts may keep: the loss has its graph no longer."""
    return replace(rows, image=_without_graph(rows.image), text=_without_graph(rows.text))


def _without_graph(rows: Embeddings) -> Embeddings:
    return Embeddings(rows.raw.detach(), rows.projected.detach(), rows.unit.detach())
