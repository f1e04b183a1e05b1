"""What every tower offers, and the true widths of what it gives: seen, never guessed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call


class Tower(nn.Module):
    """Pixels [b c h w], or tokens and mask [b t], to features [b f] of the width it says.

    Attributes:
        trunk: The library's model.
        width: Features of a pooled row.
        sequence_width: Features of each token.
        inert: Names of parameters that the pooled features do not depend on; never trained.
        left_out: What to tell of a part of the model that the tower does not take; mostly None.
    """

    width: int
    sequence_width: int
    inert: frozenset[str]
    left_out: str | None = None

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self._resting: list[nn.Module] = []

    def forward_sequence(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Pooled features [b f] and the tokens [b s e] that they were pooled from."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Float[Tensor, "b f"]:
        return self.forward_sequence(*inputs)[0]

    def checkpoint_blocks(self) -> bool:
        """Compute activations again in the backward pass; False where the library cannot."""
        return False

    def block_parameters(self) -> list[list[str]]:
        """Names of the trunk's parameters: those before the blocks, then block by block.

        What follows the last block belongs to it.
        """
        raise NotImplementedError

    def rest(self, modules: Sequence[nn.Module]) -> None:
        """Keep these modules in evaluation mode from now on."""
        self._resting = list(modules)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Tower":
        super().train(mode)
        for module in self._resting:
            module.eval()
        return self


@dataclass(frozen=True)
class Seen:
    """What one row through a tower showed; the fields are `Tower`'s."""

    width: int
    sequence_width: int
    inert: frozenset[str]


def look(tower: Tower, *inputs: Tensor) -> None:
    """Set a tower's `width`, `sequence_width` and `inert` from one row of inputs.

    The row goes forward and back on the meta device, which computes nothing, if the tower can.
    """
    was_training = tower.training
    tower.eval()
    try:
        with torch.enable_grad():
            seen = _look_on_meta(tower, inputs) or _look_here(tower, inputs)
    finally:
        tower.train(was_training)
    tower.width, tower.sequence_width, tower.inert = seen.width, seen.sequence_width, seen.inert


class _Whole(nn.Module):
    """`forward_sequence` as a forward, which `functional_call` needs."""

    def __init__(self, tower: Tower):
        super().__init__()
        self.tower = tower

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.tower.forward_sequence(*inputs)


def _look_on_meta(tower: Tower, inputs: tuple[Tensor, ...]) -> Seen | None:
    names = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    state = {
        f"tower.{name}": tensor.detach().to("meta").requires_grad_(name in names)
        for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]
    }
    try:
        outputs = functional_call(_Whole(tower), state, tuple(x.to("meta") for x in inputs))
        return _seen(outputs, {name: state[f"tower.{name}"] for name in names})
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # some forwards read values, or hold tensors that are not registered


def _look_here(tower: Tower, inputs: tuple[Tensor, ...]) -> Seen:
    trained: dict[str, Tensor] = {n: p for n, p in tower.named_parameters() if p.requires_grad}
    with without_values(tower):
        return _seen(tower.forward_sequence(*inputs), trained)


def without_values(tower: nn.Module) -> AbstractContextManager[Any]:
    """Lets a tower that was built on the meta device run where its forward looks at values."""
    on_meta = any(parameter.is_meta for parameter in tower.parameters())
    return FakeTensorMode(allow_non_fake_inputs=True) if on_meta else nullcontext()


def _seen(outputs: tuple[Tensor, Tensor], parameters: dict[str, Tensor]) -> Seen:
    pooled, sequence = outputs
    assert pooled.ndim == 2, f"a tower must give [b f], this one gives {list(pooled.shape)}"
    assert sequence.ndim == 3, f"tokens must be [b s e], these are {list(sequence.shape)}"
    reached = torch.autograd.grad(pooled.sum(), list(parameters.values()), allow_unused=True)
    inert = frozenset(name for name, g in zip(parameters, reached, strict=True) if g is None)
    return Seen(pooled.shape[1], sequence.shape[2], inert)
