"""LoRA in torch's own attention layer, whose weights stay where they are.

peft's layer adds the adapter to the weights before its forward and subtracts it afterwards: the
kept weights move by a rounding with every pass, and are other parameters than those that an engine
has sharded. It also adds the output projection's adapter twice (0.21.2). Here the adapter's part is
computed beside the weights' own, as in a linear layer, so that dropout acts on its input too. The
names are peft's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor


class AdaptedAttention(MultiheadAttention):
    """`nn.MultiheadAttention` with an adapter on its input and its output projection."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **options: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`, for batches.

        Of its `options` `average_attn_weights` counts; `is_causal` is but a hint about `attn_mask`.
        """
        base: Any = self.get_base_layer()
        same = query is key and key is value
        if not base.batch_first:
            query, key, value = (rows.transpose(0, 1) for rows in (query, key, value))
        joint = self._project(query) if same else None
        q, k, v = (
            (self._project(rows) if joint is None else joint).chunk(3, -1)[place]
            for place, rows in enumerate((query, key, value))
        )
        q, k, v = (_split(rows, base.num_heads) for rows in (q, k, v))
        mask = _additive(attn_mask, key_padding_mask, q)
        dropout = base.dropout if self.training else 0.0
        if need_weights:
            mixed, weights = _with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if options.get("average_attn_weights", True) else weights
        else:
            mixed, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        rows = base.out_proj(mixed.transpose(1, 2).flatten(2))
        return (rows if base.batch_first else rows.transpose(0, 1)), weights

    def _project(self, rows: Float[Tensor, "b s e"]) -> Float[Tensor, "b s w"]:
        """Queries, keys and values side by side."""
        base: Any = self.get_base_layer()
        own = F.linear(rows, base.in_proj_weight, base.in_proj_bias)
        for name in self.active_adapters:
            low = self.lora_A[name](self.lora_dropout[name](rows))
            own = own + self.lora_B[name](low) * self.scaling[name]
        return own

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the weights, which stay the parameters that they are."""
        base: Any = self.get_base_layer()
        for name in adapter_names or self.active_adapters:
            base.in_proj_weight.data += self.get_delta_weight(name)
            self.merged_adapters.append(name)
        base.out_proj.merge(safe_merge, adapter_names)

    def _restore_weights(self) -> None:
        """They were never taken out."""


def _split(rows: Float[Tensor, "b s e"], heads: int) -> Float[Tensor, "b h s w"]:
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _additive(
    mask: Tensor | None, padding: Tensor | None, like: Float[Tensor, "b h s w"]
) -> Tensor | None:
    """Both masks as one to add to logits [b h s t]; true in a mask of truths hides a place."""
    summed: Any = None
    if mask is not None:
        whole = mask.unflatten(0, (len(like), -1)) if mask.ndim == 3 else mask
        summed = _in_numbers(whole, like)
    if padding is not None:
        hidden = _in_numbers(padding, like)[:, None, None]
        summed = hidden if summed is None else summed + hidden
    return summed


def _in_numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights
