"""Weights in the precision of products, cast once for all forwards of an update.

autocast casts an fp32 weight where it meets a product, and keeps the cast until its outermost
context ends: by itself, to the end of one forward. A batch in chunks would cast every weight
twice a chunk.
"""

from contextlib import AbstractContextManager

import torch


class Casts:
    """The casts of one model's weights, from the beginning of an update to its last backward."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device.type, dtype
        self._is_narrow = dtype != torch.float32
        self._update: torch.autocast | None = None

    def begin(self) -> None:
        """Keep from now on what forwards cast; forget what is kept of other weights."""
        self.end()
        if self._is_narrow:
            # It casts nothing, and holds the casts of the forwards inside it.
            self._update = torch.autocast(self._device, enabled=False)
            self._update.__enter__()

    def end(self) -> None:
        """Forget what is kept: the weights change now."""
        if self._update is not None:
            self._update.__exit__(None, None, None)
            self._update = None

    def forward(self) -> AbstractContextManager[object]:
        """Products in the narrow precision."""
        return torch.autocast(self._device, self._dtype, enabled=self._is_narrow)
