"""FLOPs of an update, counted on one row and scaled to the batch; recomputation does not count."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmscale.contracts import InputSpec
from mmscale.model.two_tower import TwoTower

SHORT = 8


@dataclass(frozen=True)
class Flops:
    """Forward and backward of one row through the towers; a frozen tower goes forward only.

    Attributes:
        image: Of an image.
        token: Of a caption, what grows with its tokens.
        token_pair: Of a caption, what grows with their square.
    """

    image: float
    token: float
    token_pair: float

    def update(self, rows: int, tokens: int) -> float:
        """Of an update over so many pairs, captions padded to `tokens`."""
        return rows * (self.image + self.token * tokens + self.token_pair * tokens**2)


def count_flops(model: TwoTower, spec: InputSpec) -> Flops:
    """Send one row through both towers, forward and back; draws random numbers if they do.

    Args:
        model: Whole, before an engine takes it.
        spec: Its input.
    """
    device = next(model.parameters()).device
    size, longest = spec.image_size, spec.context_length
    short = min(SHORT, longest // 2) or longest
    image = _both(model, "image", torch.zeros(1, 3, size, size, device=device))
    few, many = (_caption(model, count, device) for count in (short, longest))
    # Attention's products grow with the square, all others with the tokens.
    pairs = (many / longest - few / short) / (longest - short) if longest > short else 0.0
    return Flops(image, many / longest - pairs * longest, pairs)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count every product within; torch's shortcut for attention in evaluation hides its own."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


def _caption(model: TwoTower, tokens: int, device: torch.device) -> int:
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
    return _both(model, "text", ids, ids.bool())


def _both(model: TwoTower, mode: str, *inputs: Tensor) -> int:
    with counting() as counter:
        output: Any = model(mode, *inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        if output.requires_grad:
            torch.autograd.grad(output.float().sum(), trained, allow_unused=True)
    return counter.get_total_flops()
