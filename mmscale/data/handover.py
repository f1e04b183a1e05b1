"""Memory through which workers hand their rows to the training process, taken once and used again.

Fresh shared memory for each share would cost a page fault for every 4 KiB on both sides: as much
as a tenth of the decoding.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

# Shares that a loader asks a worker for in advance.
PREFETCH = 2
# A worker is asked for a share when the one `PREFETCH` before it is handed out, and by then the
# share before that one has been copied into its batch: its memory is free.
_SLOTS = PREFETCH + 1


class Handover:
    """Slots of rows, made before the workers start.

    Args:
        rows: Rows in each share of each worker.
        side: Of the square images, pixels.
    """

    def __init__(self, rows: Sequence[int], side: int):
        self._slots = [
            torch.empty(_SLOTS, count, side, side, 3, dtype=torch.uint8).share_memory_()
            for count in rows
        ]
        self._stamps = [
            torch.zeros(_SLOTS, count, dtype=torch.int64).share_memory_() for count in rows
        ]

    def put(
        self,
        worker: int,
        turn: int,
        images: Sequence[UInt8[Tensor, "3 h w"]],
        stamps: Sequence[int],
    ) -> None:
        """Write the rows of a worker's `turn`-th share, each with what tells whose it is."""
        self._stamps[worker][turn % _SLOTS] = torch.tensor(stamps)
        torch.stack([image.permute(1, 2, 0) for image in images], out=self._slot(worker, turn))

    def get(self, worker: int, turn: int) -> UInt8[Tensor, "b 3 h w"]:
        """The rows of a share: to be copied before the worker's next share is asked for."""
        return self._slot(worker, turn).permute(0, 3, 1, 2)

    def stamps(self, worker: int, turn: int) -> Int64[Tensor, " b"]:
        """What came with these rows; to be read when they have been copied."""
        return self._stamps[worker][turn % _SLOTS].clone()

    def _slot(self, worker: int, turn: int) -> Tensor:
        return self._slots[worker][turn % _SLOTS]
