"""What one stage leaves to the next, in memory: the weights, and how far the run has come."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mmscale.checkpoint.state import Progress
from mmscale.contracts import NamedTensor


class Carried:
    """An `Origin` without a disk. Every rank holds all weights, as when it built the model.

    A stage begins with a fresh optimizer, an empty queue, and a running mean that starts at the
    weights: moments and rows of another objective would be wrong ones.
    """

    def __init__(self, tensors: Iterable[NamedTensor], progress: Progress):
        """Take the weights out of an engine. Collective.

        Args:
            tensors: The engine's: fp32 masters of what is trained, and everything else.
            progress: Where the next stage begins.
        """
        self.progress = progress
        self._values = {tensor.name: tensor.value.detach().cpu().clone() for tensor in tensors}

    def load_weights(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, own in model.state_dict().items():
                own.copy_(self._values[name])

    def load_momentum(self, own: Mapping[str, Tensor]) -> None:
        """Nothing: it was copied from the weights."""

    def moments(self, name: str) -> dict[str, Tensor]:
        return {}

    def random(self, rank: int) -> dict[str, Tensor]:
        return {}

    def companions(self, prefix: str) -> dict[str, Tensor]:
        return {}
