"""The momentum encoder: a second model that is the running mean of the trained one.

Source: He et al. 2020, "Momentum Contrast" (arXiv 1911.05722), equation 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.contracts import Batch, Features, LossInput, NamedTensor
from mmscale.engine.inference import Inference
from mmscale.engine.protocol import Shadow
from mmscale.parallel.device import DevicePolicy
from mmscale.training.part import Part, Step


class Momentum(Part):
    """Follows the trained weights, and encodes rows with both towers and heads of their mean.

    Its own weights are filled before an engine shards the model: `restore` has nothing to do.
    """

    name = "momentum"
    follows_on_device = True

    def __init__(
        self, shadow: Shadow, policy: DevicePolicy, decay: float, micro_rows: int, encodes: bool
    ):
        """Wrap a model that follows.

        Args:
            shadow: Of the engine (`Engine.shadow`).
            policy: Device and precision of the forward.
            decay: m of w' <- m w' + (1 - m) w.
            micro_rows: Rows forwarded at once.
            encodes: The objective, the queue or prototypes look at its rows.
        """
        self._shadow = shadow
        self._inference = Inference(shadow.module, policy)
        self._decay = decay
        self._micro_rows = micro_rows
        self._encodes = encodes
        self._rows: tuple[Tensor | None, Tensor | None] = (None, None)
        # Forward without a graph; mode and inputs as of the trained model.
        self.call: Callable[..., object] = self._inference.call

    def before(self, step: Step, batch: Batch) -> None:
        if self._encodes:
            self._rows = self.encode(batch)

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        return replace(rows, momentum_image=self._rows[0], momentum_text=self._rows[1])

    def encode(self, batch: Batch) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Unit rows of the batch's images and captions, without a graph. Collective in shards.

        Args:
            batch: This rank's rows, on the device; cached features go through the heads alone.
        """
        image, text = batch.image, batch.tokens
        if batch.mask is not None:
            parts = []
            for start in range(0, len(batch), self._micro_rows):
                rows = slice(start, start + self._micro_rows)
                call = self._inference.call
                features = call("text", batch.tokens[rows], batch.mask[rows])
                parts.append((call("image", batch.image[rows]), features))
            image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        embedded = self._inference.call("heads", image, text)
        return embedded[0].unit, embedded[1].unit

    def follow(self, rows: LossInput, batch: Batch, applied: Tensor | None = None) -> None:
        share = 1 - self._decay
        self._shadow.follow(share if applied is None else share * applied.float())

    def tensors(self) -> Iterator[NamedTensor]:
        for name, value in self._shadow.tensors():
            yield NamedTensor(f"{self.name}.{name}", value, {})

    def close(self) -> None:
        self._shadow.close()
