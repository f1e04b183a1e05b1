"""A trained model as a user calls it: images and captions to embeddings. Called by loading, export.

The names are OpenCLIP's (`encode_image`, `encode_text`), so that code written for it works here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mmscale.contracts import InputSpec
from mmscale.model.two_tower import TwoTower


class DualEncoder(nn.Module):
    """The two towers with their heads, in evaluation mode."""

    def __init__(self, model: TwoTower, pad_token: int):
        super().__init__()
        self.model = model.eval()
        self.pad_token = pad_token

    def encode_image(
        self, pixels: Float[Tensor, "b c h w"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        """Embeddings of normalised pixels; unit rows with `normalize`."""
        rows = self.model.head["image"](self.model("image", pixels))
        return F.normalize(rows, dim=-1) if normalize else rows

    def encode_text(
        self,
        tokens: Int64[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        normalize: bool = False,
    ) -> Float[Tensor, "b d"]:
        """Embeddings of captions; unit rows with `normalize`.

        Args:
            tokens: Token ids, shorter captions padded at their end.
            mask: True on real tokens; without it, everything up to a row's last token that is not
                padding.
            normalize: Divide each row by its norm.
        """
        if mask is None:
            real = (tokens != self.pad_token).long()
            mask = real.flip(1).cumsum(1).flip(1) > 0
        rows = self.model.head["text"](self.model("text", tokens, mask))
        return F.normalize(rows, dim=-1) if normalize else rows

    def logit_scale(self) -> float:
        """The learnt 1 / temperature."""
        return float(self.model.scale().detach())

    def forward(
        self, pixels: Float[Tensor, "b c h w"], tokens: Int64[Tensor, "m t"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "m d"]]:
        """Unit rows of both."""
        return self.encode_image(pixels, True), self.encode_text(tokens, normalize=True)


class Tokenizer:
    """Captions to padded token ids, as OpenCLIP's tokenizers give them."""

    def __init__(self, spec: InputSpec):
        self._spec = spec

    def __call__(self, captions: str | Sequence[str]) -> Int64[Tensor, "b t"]:
        rows = self._spec.tokenize([captions] if isinstance(captions, str) else list(captions))
        ids = [torch.tensor(row) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._spec.pad_token)
