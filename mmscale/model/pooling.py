"""Token sequences to one vector: `cls`, `mean`, `eos`, `map`; padding never counts."""

import torch
from jaxtyping import Bool, Float
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

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
