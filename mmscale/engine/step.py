"""One update: rows to loss to gradient to weights, agreed on in one small reduction."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmscale.contracts import (
    COMPONENTS,
    KINDS,
    PARTS,
    Batch,
    Embeddings,
    Engine,
    Features,
    LossInput,
    LossOutput,
    Peers,
    StepRecord,
)
from mmscale.dist.phases import phase
from mmscale.engine.companions import Companions
from mmscale.engine.gradient_cache import Judged, encode_rows, forward_backward
from mmscale.loss.objective import Objective

ALONE = Companions()
# Rows of the momentum encoders, where a term or the bank wants them.
Momentum: TypeAlias = tuple[Tensor | None, Tensor | None]


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
    companions: Companions = ALONE,
    written: bool = False,
    is_logged: bool = True,
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
        companions: Momentum encoder, queue, pairs and clusters, where they are used.
        written: This rank has done its part of the checkpoint in flight.
        is_logged: Floors and chance values of the terms are wanted.
    """
    scale_module: Any = engine.module.get_submodule("scale")
    scale_module.begin(step)
    momentum: Momentum = (None, None)
    if companions.momentum and (companions.momentum_rows or companions.bank_momentum):
        momentum = companions.momentum.encode(batch)
    bank, prototypes = companions.remembered(step), None
    if companions.clusters:
        companions.clusters.begin(step)
        prototypes = companions.clusters.of(batch.match_ids)

    def judge(features: Features) -> Judged:
        with phase("loss"):
            return contrasted(features)

    def contrasted(features: Features) -> Judged:
        image, text, scale, bias = engine.call("heads", features.image, features.text)
        matched = None
        if companions.matcher:
            similarity = (scale * image.unit @ text.unit.T).detach()
            matched = companions.matcher(engine.call, batch, features, similarity, step)
        rows = LossInput(
            image=image,
            text=text,
            ids=batch.match_ids,
            scale=scale,
            bias=bias,
            step=step,
            is_logged=is_logged,
            labels=batch.labels,
            momentum_image=momentum[0],
            momentum_text=momentum[1],
            bank=bank,
            matching=matched.logits if matched else None,
            matching_targets=matched.targets if matched else None,
            class_logits=matched.class_logits if matched else None,
            prototypes=prototypes,
        )
        return Judged(image, text, scale, objective(rows))

    judged = _gradients(engine, batch, micro_rows, companions.matcher is not None, judge)
    scale = float(judged.scale.detach())
    record = _agree(engine, peers, batch, judged.loss, lr, scale, (stop, written))
    if record.applied:
        with phase("optimizer"):
            engine.apply(factor, record.grad_norm["total"])
        _follow(companions, peers, momentum, judged, batch.match_ids)
    else:
        engine.discard()
    return Update(record, _detached(judged.image), _detached(judged.text))


def _gradients(
    engine: Engine,
    batch: Batch,
    micro_rows: int,
    sequences: bool,
    judge: Callable[[Features], Judged],
) -> Judged:
    """Forward and backward of the whole batch, in chunks where it does not fit."""
    engine.open_window()
    if batch.mask is not None and micro_rows < len(batch):
        return forward_backward(engine, batch, micro_rows, sequences, judge)
    features = (
        Features(batch.image, batch.tokens)
        if batch.mask is None
        else encode_rows(engine, batch, slice(None), sequences)
    )
    judged = judge(features)
    with phase("backward"):
        engine.backward(judged.loss.total, last=True)
    return judged


def _follow(
    companions: Companions, peers: Peers, momentum: Momentum, judged: Judged, ids: Tensor
) -> None:
    """Companions see the update; the global batch in its order, so that every rank keeps it."""
    if companions.momentum:
        companions.momentum.follow()
    everyone = peers.columns(ids) if companions.bank or companions.clusters else ids
    if companions.bank:
        image, text = (
            momentum if companions.bank_momentum else (judged.image.unit, judged.text.unit)
        )
        assert image is not None, "a bank of momentum rows has its encoder"
        assert text is not None, "a bank of momentum rows has its encoder"
        companions.bank.add(peers.columns(image.detach()), peers.columns(text.detach()), everyone)
    if companions.clusters and momentum[0] is not None:
        companions.clusters.add(peers.columns(momentum[0]), everyone)


def _agree(
    engine: Engine,
    peers: Peers,
    batch: Batch,
    loss: LossOutput,
    lr: float,
    scale: float,
    said: tuple[bool, bool],
) -> StepRecord:
    """The one small reduction: losses, norms, keys, damage, and what this rank says.

    That is its wish to stop, and that it has written its part of a checkpoint.
    """
    names = list(loss.terms)
    values = [loss.total.detach(), *loss.terms.values()]
    numbers = torch.cat(
        [
            torch.stack([value.double().cpu() for value in values]) / peers.size,
            _part_norms(engine),
            torch.tensor(_digest_parts(batch.keys), dtype=torch.float64),
            torch.tensor(
                [
                    float(len(batch.damaged)),
                    float(batch.cut),
                    float(_tokens(batch)),
                    *map(float, said),
                ],
                dtype=torch.float64,
            ),
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
        lr=lr,
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


def _detached(rows: Embeddings) -> Embeddings:
    return Embeddings(rows.raw.detach(), rows.projected.detach(), rows.unit.detach())
