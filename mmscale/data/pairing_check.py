"""Do pixels, tokens and keys of a row come from one sample: checked in every batch.

Pixels cross from the workers through memory that is used again, everything else through a queue,
and tokens are made for a whole share at once: each could deal captions to other images, and no
figure of the batch would show it.
"""

import zlib
from collections.abc import Sequence

from jaxtyping import Int64
from torch import Tensor

from mmscale.contracts import InputSpec


def stamp(key: str) -> int:
    """What travels with a row's pixels."""
    return zlib.crc32(key.encode())


def check_pixels(keys: Sequence[str], stamps: Int64[Tensor, " b"]) -> None:
    """Compare what came with the pixels with the rows' keys."""
    wrong = [key for key, mark in zip(keys, stamps.tolist(), strict=True) if mark != stamp(key)]
    assert not wrong, f"{len(wrong)} rows have another sample's pixels, the first {wrong[0]}"


def check_tokens(
    row: int,
    keys: Sequence[str],
    captions: Sequence[str],
    tokens: Sequence[list[int]],
    spec: InputSpec,
) -> None:
    """Tokenise one row's caption again, alone."""
    row %= len(keys)
    assert spec.tokenize([captions[row]])[0] == tokens[row], (
        f"{keys[row]} has tokens that its caption alone does not give"
    )
