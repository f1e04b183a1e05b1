"""The one small reduction of an update: every figure of its record, on the device.

What decides over the update, the norm and whether all is finite, is read there where the host runs
ahead, and by the host elsewhere.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.contracts import COMPONENTS, KINDS, PARTS, Batch, LossOutput, Peers, StepRecord
from mmscale.engine.gradient_cache import StepOutput
from mmscale.engine.protocol import Engine
from mmscale.parallel.device import Arriving, exact_device, send
from mmscale.parallel.phases import phase
from mmscale.training.part import Step


@dataclass(frozen=True)
class Outcome:
    """An update's figures where the device has them.

    Attributes:
        numbers: Sums over ranks: of the loss, its terms, each part's squared gradient norm, and
            what ranks say (`_said`); then this rank's logit scale.
        names: Of the terms.
        arriving: The same numbers on their way to the host.
        lr: For the record.
        size: Ranks.
    """

    numbers: Tensor
    names: list[str]
    arriving: Arriving
    lr: float
    size: int

    def total_norm(self) -> Tensor:
        """Of the whole gradient, on the device; NaN or infinite where it is not finite."""
        first = 1 + len(self.names)
        return self.numbers[first : first + len(PARTS)].sum().sqrt()

    def applied(self) -> Tensor:
        """Whether loss and gradient are finite, on the device."""
        return self.numbers[0].isfinite() & self.total_norm().isfinite()

    def record(self) -> StepRecord:
        """The figures on the host; waits for the device."""
        total, *rest = self.arriving.read()
        terms, rest = dict(zip(self.names, rest, strict=False)), rest[len(self.names) :]
        squares, rest = dict(zip(PARTS, rest, strict=False)), rest[len(PARTS) :]
        parts, (damaged, cut, tokens, stops, written, scale) = rest[:4], rest[4:]
        whole = {
            name: _norm(squares[f"{name}_{kind}"] for kind in KINDS) for name in COMPONENTS
        } | {"total": _norm(squares.values())}
        return StepRecord(
            loss=total,
            terms=terms,
            lr=self.lr,
            logit_scale=scale,
            grad_norm=whole,
            grad_norm_parts={name: _norm([square]) for name, square in squares.items()},
            keys_digest=_digest(parts),
            applied=math.isfinite(whole["total"]) and math.isfinite(total),
            damaged=int(damaged),
            cut=int(cut),
            tokens=int(tokens),
            stop=stops > 0,
            written=written == self.size,
        )


def agree(engine: Engine, peers: Peers, batch: Batch, output: StepOutput, step: Step) -> Outcome:
    """The one small reduction: losses, norms, keys, damage, and what this rank says.

    That is its wish to stop, and that it has written its part of a checkpoint. Collective.

    Args:
        engine: After the last backward of the update.
        peers: All ranks.
        batch: This rank's rows.
        output: What the objective saw and made of them.
        step: Which update.
    """
    loss, where = output.loss, exact_device(engine.device)
    said = [
        *_digest_parts(batch.keys),
        *(float(value) for value in (len(batch.damaged), batch.cut, step.stop, step.written)),
    ]
    known = send(torch.tensor(said, dtype=torch.float64), where)
    with phase("optimizer"):
        squares = engine.part_norms().to(where, torch.float64)
    shares = torch.cat(
        [
            _stacked(loss, where) / peers.size,
            squares,
            known[:6],
            _tokens(batch, where),
            known[6:],
        ]
    )
    scale = output.rows.scale.detach().reshape(1).to(where, torch.float64)
    numbers = torch.cat([peers.total(shares), scale])
    return Outcome(numbers, list(loss.terms), Arriving(numbers), step.lr, peers.size)


def _stacked(loss: LossOutput, where: torch.device) -> Tensor:
    values = [loss.total.detach(), *loss.terms.values()]
    return torch.stack([_at(value, where).double() for value in values])


def _at(value: Tensor, where: torch.device) -> Tensor:
    """Some terms' floors are numbers of the host."""
    return send(value, where) if value.device.type == "cpu" else value.to(where)


def _tokens(batch: Batch, where: torch.device) -> Tensor:
    """Real tokens that go through the text tower."""
    if batch.mask is None:
        return torch.zeros(1, dtype=torch.float64, device=where)
    return batch.mask.sum().reshape(1).to(where, torch.float64)


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
