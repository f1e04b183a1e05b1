"""What a run asks of an engine; `accelerate.py`, `fsdp.py` and `deepspeed.py` answer it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.contracts import NamedTensor


@runtime_checkable
class Engine(Protocol):
    """Holds the model, shards it or not, and applies updates; three implementations.

    One update is `begin_update`, any number of `call`s and `backward`s of which the last
    says so, then perhaps `pull`, then `part_norms`, then `apply` or `skip_update`. Gradients are
    averaged over ranks. Where the host runs ahead of the device, `apply` alone ends it.

    Attributes:
        label: Name for the log.
        device: Where this rank computes.
        module: The model; sharded weights are only whole inside `call`.
        groups: Optimizer groups with their base rates.
        decides_on_device: `apply` takes the norm, and whether the update is applied, from the
            device: nothing of an update is waited for.
    """

    label: str
    device: torch.device
    module: nn.Module
    groups: list[dict[str, Any]]
    decides_on_device: bool

    def call(self, mode: str, *inputs: Any) -> Any:
        """Forward through the engine in its precision; `mode` as in the model's forward."""

    def begin_update(self) -> None:
        """Forget every gradient of the update before."""

    def backward(self, loss: Tensor, last: bool, scaled: bool = False) -> None:
        """Accumulate gradients; with `last` they become final and are averaged over ranks.

        `scaled`: the loss is made of this update's gradients, which carry the loss scale already.
        """

    def part_norms(self) -> Float[Tensor, " parts"]:
        """This rank's share of the squared gradient norm of each of `PARTS`; ranks add up."""

    def apply(
        self, factor: float, total_norm: float | Tensor, applied: Tensor | None = None
    ) -> None:
        """Clip a gradient of norm `total_norm`; update, each rate `factor` times its base.

        Args:
            factor: Of every rate.
            total_norm: Of the whole gradient; on the device where `applied` is.
            applied: A flag on the device, with `decides_on_device`: where it is false, no weight,
                moment or count changes.
        """

    def skip_update(self) -> None:
        """End the update without changing a weight."""

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of the trained weights in fp32, by parameter: views, not copies.

        The shares of all ranks make each parameter whole once.
        """

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Of something as large as a parameter of `masters`: this rank's share, as it has it."""

    def pull(self, added: Iterable[tuple[str, Tensor]], factor: float) -> None:
        """Add to this rank's share of the averaged gradient.

        Args:
            added: By parameters of `masters`, each as large as its share.
            factor: Of all of them.
        """

    def tensors(self) -> Iterator[NamedTensor]:
        """Every parameter and buffer in an order equal on all ranks. Collective."""

    def shadow(self, module: nn.Module) -> "Shadow":
        """Let a copy of the model, taken before this engine was built, follow its weights."""

    def scaler(self) -> dict[str, float]:
        """State of the loss scaling that fp16 needs; empty without it."""

    def restore(
        self,
        moments: Callable[[str], dict[str, Tensor]],
        updates: int,
        scaler: dict[str, float],
    ) -> None:
        """Set the optimizer's moments by parameter name, its count of updates and the loss scaling.

        The weights come with the model that the engine was built from.
        """

    def close(self) -> None:
        """Free what the engine holds."""


@runtime_checkable
class Shadow(Protocol):
    """A second model that follows an engine's weights.

    Attributes:
        module: Called as the engine's model; sharded weights are whole inside its forward.
    """

    module: nn.Module

    def follow(self, share: float | Tensor) -> None:
        """Move every averaged tensor this share, which may lie on the device, to the engine's."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every averaged tensor, whole, in an order equal on all ranks. Collective."""

    def close(self) -> None:
        """Free what the second model holds."""
