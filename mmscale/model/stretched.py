"""Text towers that take longer captions than they were trained with: stretched position tables.

The first positions stay as they are, since captions have trained them well; the others are spread
over what is asked for by linear interpolation. A caption that fits into the first is read as
before.

Source: Zhang et al. 2024, "Long-CLIP" (arXiv 2403.15378), section 3.1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.errors import ConfigError

KEPT = 20
SETTING = "model.text.context_length"


def stretched(table: Float[Tensor, "p w"], length: int, before: int = 0) -> Float[Tensor, "q w"]:
    """A position table of more rows.

    Args:
        table: Learnt rows, a position each.
        length: Positions wanted, more than there are.
        before: Rows in front of the first position (RoBERTa's, for padding).
    """
    first, rest = table[: before + KEPT], table[before + KEPT :]
    spread = F.interpolate(rest.T[None], length - KEPT, mode="linear", align_corners=True)[0].T
    return torch.cat([first, spread])


def stretch_hf(trunk: Any, asked: int | None, longest: int) -> int:
    """Give a text model of Hugging Face's a table for captions of `asked` tokens.

    Args:
        trunk: With its weights.
        asked: `model.text.context_length`.
        longest: Tokens that its table has rows for.

    Returns:
        Tokens that it takes now.

    Raises:
        ConfigError: It keeps positions in another way, or pads every caption to its whole length.
    """
    if not asked or asked <= longest:
        return longest
    found = [
        module
        for name, module in trunk.named_modules()
        if name.endswith(("position_embeddings", "position_embedding"))
        and isinstance(module, nn.Embedding)
    ]
    if len(found) != 1 or trunk.config.model_type.startswith("siglip"):
        raise ConfigError(
            f"{SETTING}={asked} is more than the {longest} tokens that the tower takes, and it has "
            f"no table of positions that could be stretched; lower it."
        )
    table = found[0]
    before = table.num_embeddings - longest
    _require_rest(longest, asked)
    rows = stretched(table.weight.detach(), asked, before)
    table.weight, table.num_embeddings = nn.Parameter(rows), len(rows)
    trunk.config.max_position_embeddings = len(rows)
    for module in trunk.modules():
        for name, kept in list(module.named_buffers(recurse=False)):
            if name == "position_ids":
                module.register_buffer(name, _counted(len(rows), kept), persistent=False)
            elif name == "token_type_ids":
                zeros = kept.new_zeros(1, len(rows))
                module.register_buffer(name, zeros, persistent=False)
    return asked


def stretch_openclip(trunk: Any, asked: int | None, longest: int) -> int:
    """Give a text tower of OpenCLIP's a table for captions of `asked` tokens; as `stretch_hf`.

    Raises:
        ConfigError: It reads more of a row than the caption, so that every caption would change.
    """
    # A tower of Hugging Face's within OpenCLIP's has no table of its own.
    if not asked or asked <= longest or not hasattr(trunk, "build_causal_mask"):
        return longest
    at_end = trunk.pool_type in ("argmax", "eos") and trunk.cls_emb is None
    if trunk.attn_mask is None or not at_end:
        raise ConfigError(
            f"{SETTING}={asked} is more than the {longest} tokens that the tower takes, and it "
            f"reads whole rows, which a stretched table would change for every caption; lower it."
        )
    _require_rest(longest, asked)
    trunk.positional_embedding = nn.Parameter(stretched(trunk.positional_embedding.detach(), asked))
    trunk.num_pos = trunk.context_length = asked
    trunk.register_buffer("attn_mask", trunk.build_causal_mask(), persistent=False)
    return asked


def _require_rest(longest: int, asked: int) -> None:
    if longest <= KEPT + 1:
        raise ConfigError(
            f"{SETTING}={asked} is more than the {longest} tokens that the tower takes, and of "
            f"its positions the first {KEPT} would be kept, which leaves none to stretch; lower it."
        )


def _counted(rows: int, like: Tensor) -> Tensor:
    return torch.arange(rows, dtype=like.dtype, device=like.device).expand(1, -1)
