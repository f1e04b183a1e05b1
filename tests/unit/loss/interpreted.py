"""The kernels in Triton's interpreter against the losses in float64: prints errors as JSON.

Run as `TRITON_INTERPRET=1 python -m tests.unit.loss.interpreted`, in a process of its own: Triton
reads the variable when it is imported.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder

from mmscale.contracts import Bank
from mmscale.loss import kernels
from mmscale.loss.contrast import PairRows
from mmscale.loss.infonce import infonce
from mmscale.loss.kernels import fused
from mmscale.loss.sigmoid import siglip
from mmscale.parallel.peers import Alone

# Several blocks, the last ones not full, in splits and strips of several.
BLOCK, ROWS, WIDTH, SLOTS = (16, 16, 16, 4), 37, 20, 21
IDS = {
    "distinct": torch.arange(ROWS),
    "alike in threes": torch.arange(ROWS) // 3,
    "all alike": torch.zeros(ROWS, dtype=torch.int64),
}
SCALES = (10.0, 100.0)


def multiply_bf16() -> None:
    """The interpreter holds bf16 as bits, and multiplies these where it should widen them first."""
    plain = InterpreterBuilder.create_dot

    def widened(self: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            self.cast_impl(h, tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b)
        )
        return plain(self, a, b, *rest)

    InterpreterBuilder.create_dot = widened


def losses(name: str) -> Callable[[PairRows, Tensor, Tensor], Tensor]:
    return (lambda p, s, b: infonce(p, s)) if name == "infonce" else siglip


def found(name: str, dtype: torch.dtype, precision: str, ids: Tensor, scale: float, bank: bool):
    """Loss and gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        rows = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        return normalize(rows, dim=1).to(dtype)

    image = draw(ROWS).requires_grad_()
    # Pairs that resemble each other somewhat: some rows are sure of theirs, and some of another.
    text = normalize(image.detach() + 3 * draw(ROWS), dim=1).requires_grad_()
    s, bias = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in (scale, -10.0))
    slots = torch.arange(SLOTS) - 2
    remembered = Bank(draw(SLOTS), draw(SLOTS), slots.clamp(min=-1)) if bank else None
    value = losses(name)(PairRows(image, text, ids, Alone(), remembered, precision), s, bias)
    inputs = (image, text, s, bias) if name == "siglip" else (image, text, s)
    return value.detach().double(), [g.double() for g in torch.autograd.grad(value, inputs)]


def cases() -> Iterator[dict]:
    for name in ("infonce", "siglip"):
        for ids in IDS:
            for scale in SCALES:
                for bank in (False, True):
                    yield {"name": name, "ids": ids, "scale": scale, "bank": bank}


def main() -> None:
    multiply_bf16()
    fused.NARROW = fused.FULL = BLOCK
    fused.PROGRAMS, fused.STRIP_LOGITS = 6, 2 * ROWS * BLOCK[1]
    told = []
    for case in cases():
        words = case["name"], IDS[case["ids"]], case["scale"], case["bank"]
        kernels.run_on = lambda rows: False
        wanted, gradients = found(words[0], torch.float64, "fp32", *words[1:])
        kernels.run_on = lambda rows: True
        for precision in ("fp32", "bf16"):
            value, own = found(words[0], torch.float32, precision, *words[1:])
            if words[2:] == (10.0, True):
                again, repeated = found(words[0], torch.float32, precision, *words[1:])
                assert torch.equal(value, again), case
                assert all(map(torch.equal, own, repeated)), case
            size = torch.cat([g.flatten() for g in gradients[:2]]).norm()
            told.append(
                case
                | {
                    "precision": precision,
                    "value": (value - wanted).abs().item() / max(1.0, wanted.abs().item()),
                    "gradients": [
                        ((one - other).norm() / size).item()
                        for one, other in zip(own[:2], gradients[:2], strict=True)
                    ],
                    # Of all logits' gradients one number is left, which may be next to nothing.
                    "numbers": [
                        ((one - other).abs() / max(1.0, other.abs())).item()
                        for one, other in zip(own[2:], gradients[2:], strict=True)
                    ],
                }
            )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
