"""Towers, heads, scale and fusion as one module whose parameters name their component.

The engine wraps `TwoTower` and reaches everything through its `forward`, so that hooks of sharded
parameters fire; `mode` says which part runs. Called by engine, checkpoint and diagnostics.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmscale.contracts import COMPONENTS, Embeddings
from mmscale.model.fusion import fuse_pairs
from mmscale.model.scale import LogitScale


class TwoTower(nn.Module):
    """Image tower, text tower, heads, scale and, where it is asked for, fusion.

    A frozen tower has no gradient, runs without a graph and stays in evaluation mode. A trained
    tower keeps its BatchNorm statistics: they would depend on how the batch is cut.
    """

    vision: Any
    text: Any

    def __init__(
        self,
        vision: nn.Module,
        text: nn.Module,
        heads: Mapping[str, nn.Module],
        scale: LogitScale,
        frozen: frozenset[str] = frozenset(),
        fusion: nn.Module | None = None,
    ):
        """Put the parts together.

        Args:
            vision: Pixels [b c h w] -> [b f].
            text: Tokens and mask [b t] -> [b f].
            heads: `image` and `text`, features to the shared width.
            scale: 1 / temperature, and the bias of the logits.
            frozen: Which of `vision` and `text` keep their weights.
            fusion: A `Fusion` over both towers' tokens.
        """
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = nn.ModuleDict(dict(heads))
        self.scale = scale
        self.fusion = fusion
        self.frozen: frozenset[str] = frozenset()
        self.freeze(frozen)

    def freeze(self, towers: Collection[str]) -> None:
        """Keep the weights of these towers from now on, in evaluation mode."""
        self.frozen |= frozenset(towers)
        for name in towers:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TwoTower":
        super().train(mode)
        for name in ("vision", "text"):
            tower = self.get_submodule(name)
            tower.train(mode and name not in self.frozen)
            for module in tower.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, mode: str, *inputs: Any) -> Any:
        """Run one part of the model.

        `image`: pixels -> features. `text`: tokens, mask -> features. `image_sequence`,
        `text_sequence`: the same with the tower's tokens besides. `heads`: image features, text
        features -> Embeddings of each, the scale, and the logits' bias or None. `head`: `image` or
        `text`, its features -> Embeddings. `both`: pixels, tokens, mask -> as `heads`. `fuse`: as
        `fuse_pairs` after its first argument.
        """
        match mode:
            case "image":
                return self._image(*inputs)
            case "text":
                return self._text(*inputs)
            case "image_sequence":
                with self._graph("vision"):
                    return self.vision.forward_sequence(*inputs)
            case "text_sequence":
                with self._graph("text"):
                    return self.text.forward_sequence(*inputs)
            case "heads":
                return self._heads(*inputs)
            case "head":
                return self._embed(*inputs)
            case "both":
                pixels, tokens, mask = inputs
                return self._heads(self._image(pixels), self._text(tokens, mask))
            case "fuse":
                assert self.fusion is not None, "this model was built without fusion"
                return fuse_pairs(self.fusion, *inputs)
        raise AssertionError(f"unknown mode {mode!r} of TwoTower.forward")

    def _graph(self, tower: str) -> torch.set_grad_enabled:
        """A frozen tower runs without a graph."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and tower not in self.frozen)

    def _image(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        with self._graph("vision"):
            return self.vision(pixels)

    def _text(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b f"]:
        with self._graph("text"):
            return self.text(tokens, mask)

    def _heads(
        self, image: Float[Tensor, "b f"], text: Float[Tensor, "captions g"]
    ) -> tuple[Embeddings, Embeddings, Float[Tensor, "1"], Float[Tensor, "1"] | None]:
        # An evaluation has several captions an image: their number is another.
        embedded = self._embed("image", image), self._embed("text", text)
        # Asked for by calls: only those make sharded parameters whole.
        return *embedded, self.scale(), self.scale("bias")

    def _embed(self, modality: str, raw: Float[Tensor, "b f"]) -> Embeddings:
        projected = self.head[modality](raw)
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return Embeddings(raw, projected, F.normalize(wide, dim=-1))


def component_of(name: str) -> str:
    """Component of a parameter or buffer by its name: one of `COMPONENTS`."""
    component = name.split(".", 1)[0]
    assert component in COMPONENTS, f"{name} belongs to none of {', '.join(COMPONENTS)}"
    return component


def no_decay(name: str, param: Tensor) -> bool:
    """True for what weight decay must spare: norms, biases and other vectors, and the scale."""
    return param.ndim <= 1 or name.endswith("bias") or component_of(name) == "scale"
