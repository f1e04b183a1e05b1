"""One tower: what it offers, how it pools, and its true widths: seen, never guessed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call


class Tower(nn.Module):
    """Pixels [b c h w], or tokens and mask [b t], to features [b f] of the width it says.

    Attributes:
        trunk: The library's model.
        width: Features of a pooled row.
        sequence_width: Features of each token.
        inert: Names of parameters that are never trained: the pooled features do not depend on
            them, or an adapter stands beside them.
        row: One row of inputs, of the shapes that it takes.
        left_out: What to tell of a part of the model that the tower does not take; mostly None.
    """

    width: int
    sequence_width: int
    inert: frozenset[str]
    row: tuple[Tensor, ...]
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
    tower.row = inputs
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
    trained = list(parameters.values())
    reached: Sequence[Tensor | None] = [None] * len(trained)
    if pooled.requires_grad:
        reached = torch.autograd.grad(pooled.sum(), trained, allow_unused=True)
    inert = frozenset(name for name, g in zip(parameters, reached, strict=True) if g is None)
    return Seen(pooled.shape[1], sequence.shape[2], inert)


HEAD_WIDTH = 64


class Pooling(nn.Module):
    """One of the poolings; only `map` has parameters.

    `map` is one learnt query that attends to every real token, then an MLP (the pooling of SigLIP;
    Zhai et al. 2022, arXiv 2106.04560, appendix). It is drawn anew, also under pretrained weights.
    """

    def __init__(self, kind: str, width: int, prefix: int = 0):
        """Make the pooling.

        Args:
            kind: `cls`, `mean`, `eos` or `map`.
            width: Of a token.
            prefix: Leading tokens that `mean` leaves out, such as an image tower's CLS token.
        """
        super().__init__()
        self.kind = kind
        self.prefix = prefix
        if kind == "map":
            self.attention = AttentionPoolLatent(
                width, num_heads=_heads(width), norm_layer=nn.LayerNorm
            )

    def forward(
        self, sequence: Float[Tensor, "b s e"], mask: Bool[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b e"]:
        """Pool each row over its real tokens; without a mask all are real."""
        if self.kind == "cls":
            return sequence[:, 0]
        if self.kind == "map":
            return self.attention(sequence, None if mask is None else _additive(mask, sequence))
        if mask is None:
            return sequence[:, -1] if self.kind == "eos" else sequence[:, self.prefix :].mean(1)
        if self.kind == "eos":
            places = torch.arange(mask.shape[1], device=mask.device)
            last = (mask * places).argmax(1)
            return sequence[torch.arange(len(last), device=mask.device), last]
        real = mask.unsqueeze(-1).to(sequence.dtype)
        return (sequence * real).sum(1) / real.sum(1).clamp(min=1)


def _additive(mask: Bool[Tensor, "b s"], like: Tensor) -> Float[Tensor, "b 1 1 s"]:
    bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill(~mask, torch.finfo(like.dtype).min)[:, None, None]


def _heads(width: int) -> int:
    """About `HEAD_WIDTH` wide heads, as many as divide the width."""
    return next(n for n in range(max(1, width // HEAD_WIDTH), 0, -1) if width % n == 0)


def unseen_line(tower: Tower, image_size: int) -> str | None:
    """What to tell of a size that the patches do not fill; None where they do.

    Args:
        tower: The image tower.
        image_size: Side of its input, pixels.
    """
    found = [_left_over(*met) for met in _met_by_pixels(tower, image_size)]
    unseen, patch = min(found, default=(0, 1))
    if not unseen:
        return None
    less = image_size - unseen
    return (
        f"data.image_size={image_size}: the image tower's patches of {patch} pixels never see the "
        f"last {unseen} rows and columns of a picture; {less} and {less + patch} leave none unseen"
    )


def _met_by_pixels(tower: Tower, image_size: int) -> list[tuple[nn.Conv2d, int]]:
    """The convolutions over colour channels, each with the side of what it is given."""
    met: list[tuple[nn.Conv2d, int]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(inputs[0], Tensor):
            met.append((module, inputs[0].shape[-1]))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in tower.modules()
        # Kinds of it may pad their input by themselves.
        if type(module) is nn.Conv2d and module.in_channels == 3
    ]
    if not hooks:
        return met
    row = torch.zeros(1, 3, image_size, image_size)
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            _pass_through(tower, row)
    finally:
        for hook in hooks:
            hook.remove()
        tower.train(was_training)
    return met


def _pass_through(tower: Tower, row: Tensor) -> None:
    """On the meta device, which computes nothing, if the tower can."""
    named = [*tower.named_parameters(), *tower.named_buffers()]
    try:
        functional_call(tower, {name: t.to("meta") for name, t in named}, row.to("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        with without_values(tower):
            tower(row)


def _left_over(convolution: nn.Conv2d, side: int) -> tuple[int, int]:
    """Pixels at the end of a side that no window covers, and from one window to the next."""
    stride, padding = convolution.stride[-1], convolution.padding
    before = padding[-1] if isinstance(padding, tuple) else 0
    reach = convolution.dilation[-1] * (convolution.kernel_size[-1] - 1) + 1
    if padding == "same":
        return 0, stride
    windows = (side + 2 * before - reach) // stride + 1
    return max(0, side + before - (windows - 1) * stride - reach), stride
