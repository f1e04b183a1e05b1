"""Rows and columns of the picture that an image tower's patches never reach."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmscale.model.width import Tower, without_values


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
