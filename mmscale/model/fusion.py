"""Fusion: both towers' tokens look at each other, and two heads judge the pair.

Outside the guarantee of one global batch: the pairs that it judges are mined among a rank's own
rows, so what it learns depends on the number of ranks (but not on chunks).

Source: Li et al. 2021, "Align before Fuse" (arXiv 2107.07651), section 3.2, for the matching head
    and its negatives; attention both ways as in Lu et al. 2019, "ViLBERT" (arXiv 1908.02265).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmscale.config.model import FusionConfig
from mmscale.errors import ConfigError


class Fusion(nn.Module):
    """Cross-attention blocks over both sequences, pooled by their means, and the heads."""

    def __init__(self, image_width: int, text_width: int, config: FusionConfig):
        """Build with drawn weights.

        Args:
            image_width: Of the image tower's tokens.
            text_width: Of the text tower's tokens.
            config: `model.fusion`.

        Raises:
            ConfigError: The attention heads do not divide the width.
        """
        super().__init__()
        if config.dim % config.heads:
            raise ConfigError(
                f"model.fusion.heads={config.heads} must divide model.fusion.dim={config.dim}; "
                f"set for example model.fusion.heads={_divisor(config.dim, config.heads)}"
            )
        self.enter = nn.ModuleDict(
            {
                "image": _entrance(image_width, config.dim),
                "text": _entrance(text_width, config.dim),
            }
        )
        blocks = [CrossBlock(config.dim, config.heads) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(2 * config.dim)
        self.matching = nn.Linear(2 * config.dim, 2)
        self.classes = nn.Linear(2 * config.dim, config.classes) if config.classes else None

    def forward(
        self,
        image: Float[Tensor, "m s v"],
        text: Float[Tensor, "m t w"],
        mask: Bool[Tensor, "m t"],
    ) -> tuple[Float[Tensor, "m 2"], Float[Tensor, "m classes"] | None]:
        """Logits (no match, match) of m pairs, and their class logits where there are classes."""
        image, text = self.enter["image"](image), self.enter["text"](text)
        for block in self.blocks:
            image, text = block(image, text, mask)
        real = mask.unsqueeze(-1).to(text.dtype)
        means = [image.mean(1), (text * real).sum(1) / real.sum(1).clamp(min=1)]
        pooled = self.norm(torch.cat(means, 1))
        wide = torch.promote_types(pooled.dtype, torch.float32)
        classes = None if self.classes is None else self.classes(pooled).to(wide)
        return self.matching(pooled).to(wide), classes


class CrossBlock(nn.Module):
    """Images attend to captions and captions to images, both as they enter; then an MLP each."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.to_text = CrossAttention(dim, heads)
        self.to_image = CrossAttention(dim, heads)
        self.image_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.image_mlp, self.text_mlp = _mlp(dim), _mlp(dim)

    def forward(
        self,
        image: Float[Tensor, "m s d"],
        text: Float[Tensor, "m t d"],
        mask: Bool[Tensor, "m t"],
    ) -> tuple[Float[Tensor, "m s d"], Float[Tensor, "m t d"]]:
        images, texts = self.image_norm(image), self.text_norm(text)
        image = image + self.to_text(images, texts, mask)
        text = text + self.to_image(texts, images, None)
        return image + self.image_mlp(image), text + self.text_mlp(text)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        rows: Float[Tensor, "m q d"],
        others: Float[Tensor, "m k d"],
        mask: Bool[Tensor, "m k"] | None,
    ) -> Float[Tensor, "m q d"]:
        query = self._split(self.query(rows))
        key, value = (self._split(part) for part in self.key_value(others).chunk(2, -1))
        visible = None if mask is None else mask[:, None, None, :]
        seen = F.scaled_dot_product_attention(query, key, value, visible)
        return self.out(seen.transpose(1, 2).flatten(2))

    def _split(self, rows: Float[Tensor, "m q d"]) -> Float[Tensor, "m heads q e"]:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def fuse_pairs(
    fusion: nn.Module,
    image: Float[Tensor, "b s v"],
    text: Float[Tensor, "c t w"],
    mask: Bool[Tensor, "c t"],
    images: Int64[Tensor, " m"],
    texts: Int64[Tensor, " m"],
    at_once: int | None,
) -> tuple[Float[Tensor, "m 2"], Float[Tensor, "m classes"] | None]:
    """Fusion of chosen pairs.

    Args:
        fusion: A `Fusion`.
        image: Image tokens.
        text: Caption tokens.
        mask: True on real caption tokens.
        images: Row of `image` of each pair.
        texts: Row of `text` of each pair.
        at_once: Pairs whose activations fit in memory; they are computed again in backward. None:
            all.
    """

    def fuse(chosen: Tensor, others: Tensor) -> tuple[Tensor, Tensor | None]:
        return fusion(image[chosen], text[others], mask[others])

    if at_once is None or at_once >= len(images):
        return fuse(images, texts)
    parts = [
        checkpoint(fuse, *slices, use_reentrant=False)
        for slices in zip(images.split(at_once), texts.split(at_once), strict=True)
    ]
    matching, classes = zip(*parts, strict=True)
    return torch.cat(matching), None if classes[0] is None else torch.cat(classes)


def _entrance(width: int, dim: int) -> nn.Module:
    """Towers end in other ranges; a projection only where the widths differ."""
    project = nn.Identity() if width == dim else nn.Linear(width, dim)
    return nn.Sequential(nn.LayerNorm(width), project)


def _mlp(dim: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
    )


def _divisor(dim: int, near: int) -> int:
    return min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - near))
