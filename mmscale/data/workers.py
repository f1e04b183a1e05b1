"""How many processes decode for a rank."""

from typing import Literal

import torch

# On a CPU the towers compute on the cores that would decode.
ON_CPU = 2
FEWEST, MOST = 2, 12
# The training process, and the thread that sends its batches to the device.
_TAKEN = 2


def worker_count(workers: int | Literal["auto"], device: torch.device, cores: int) -> int:
    """The value of `data.workers` on this machine.

    Args:
        workers: The setting.
        device: Where the rank computes.
        cores: That the rank has for itself.
    """
    if workers != "auto":
        return workers
    if device.type == "cpu":
        return ON_CPU
    return min(max(cores - _TAKEN, FEWEST), MOST)
