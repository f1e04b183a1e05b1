"""Features of two towers that never met, of images and captions that share what they show."""

import torch
from torch import Tensor


def features(num: int, seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Rows of 96 and 64 numbers, each a random linear image of 32 shared ones, and noise."""
    draws = torch.Generator().manual_seed(seed)
    shown = torch.randn(num, 32, generator=draws) * torch.linspace(2, 0.5, 32)
    return tuple(
        shown @ torch.randn(32, width, generator=draws) / 32**0.5
        + noise * torch.randn(num, width, generator=draws)
        for width in (96, 64)
    )


def planted(num: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which caption each image has, and whether it is another image's."""
    wrong = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[: round(num * share)]
    source, is_wrong = torch.arange(num), torch.zeros(num, dtype=torch.bool)
    source[wrong], is_wrong[wrong] = wrong.roll(1), True
    return source, is_wrong
