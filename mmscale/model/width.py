"""Towers, and the true width of what they give: seen, never guessed."""

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Tower(nn.Module):
    """Pixels [b c h w], or tokens and mask [b t], to features [b f] of the width it says."""

    width: int


def output_width(tower: nn.Module, *inputs: Tensor) -> int:
    """Width of `tower(*inputs)` for one row; on the meta device, which computes nothing, if it can.

    Args:
        tower: Maps one row of inputs to [1 f].
        inputs: Arguments of its forward.
    """
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            features = _forward_on_meta(tower, inputs)
            if features is None:
                features = tower(*inputs)
    finally:
        tower.train(was_training)
    assert features.ndim == 2, f"a tower must give [b f], this one gives {list(features.shape)}"
    return features.shape[1]


def _forward_on_meta(tower: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    state = {name: tensor.to("meta") for name, tensor in tower.named_parameters()}
    state |= {name: tensor.to("meta") for name, tensor in tower.named_buffers()}
    try:
        return functional_call(tower, state, tuple(value.to("meta") for value in inputs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # some forwards read values, or hold tensors that are not registered
