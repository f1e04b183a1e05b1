"""The images of a set that are closest to words, to an image, or to both."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmscale.data.caption_text import are_cut, unknown_words
from mmscale.data.damage import DamagedSampleError
from mmscale.data.pixels import EvalTransform, decode, stack_rows
from mmscale.data.stream import pad
from mmscale.diagnostics.pairs import similarities
from mmscale.errors import ConfigError, DataError
from mmscale.evaluation.image_index import ImageIndex, embedded_images
from mmscale.evaluation.trained import Loaded
from mmscale.parallel.peers import Alone

# Rows compared at once: 16 MB of them at a width of 512.
_TILE = 8_192


@dataclass(frozen=True)
class Found:
    """An image that was found.

    Attributes:
        place: In its set.
        key: Its name there.
        score: Its cosine with what was looked for.
        captions: What is said of it.
    """

    place: int
    key: str
    score: float
    captions: tuple[str, ...]


def query_row(
    loaded: Loaded, words: str, image: Path | None, tell: Callable[[str], None]
) -> Float[Tensor, " d"]:
    """The unit row of what is looked for: of words, an image, or the middle of both.

    Args:
        loaded: The model.
        words: A caption; empty where only an image is given.
        image: A JPEG, PNG or WebP file.
        tell: Takes a line about words that the text tower does not see.

    Raises:
        ConfigError: Neither is given, or the tokenizer knows none of the words.
        DataError: The image cannot be read, or the model gives what is no number.
    """
    rows = [_of_words(loaded, words, tell)] if words.strip() else []
    if image is not None:
        rows.append(_of_image(loaded, image))
    if not rows:
        raise ConfigError("nothing to look for; give words, such as a dog in the snow, or --image")
    row = rows[0] if len(rows) == 1 else F.normalize(rows[0] + rows[1], dim=0)
    if not bool(row.isfinite().all()):
        raise DataError(
            "the model's embedding of what is looked for is not finite; use an earlier checkpoint, "
            "or engine.precision=fp32"
        )
    return row


def _of_words(loaded: Loaded, words: str, tell: Callable[[str], None]) -> Float[Tensor, " d"]:
    spec, inference = loaded.spec, loaded.inference
    token_rows = spec.tokenize([words])
    if line := unknown_words(spec, token_rows, Alone()):
        tell(f"search: {line}")
    if any(are_cut(spec, [words], token_rows)):
        tell(f"search: of the words the first {spec.context_length} tokens are looked for")
    tokens, mask = pad(token_rows, spec.pad_token, spec.caption_lengths)
    features = inference.call("text", tokens.to(inference.device), mask.to(inference.device))
    unit: Tensor = inference.call("head", "text", features.float()).unit
    return unit[0].float().cpu()


def _of_image(loaded: Loaded, path: Path) -> Float[Tensor, " d"]:
    try:
        pixels = EvalTransform(loaded.spec)(decode(path.read_bytes(), str(path)))
    except (DamagedSampleError, OSError) as error:
        raise DataError(f"--image {path}: cannot be read ({error})") from error
    return embedded_images(loaded.inference, stack_rows([pixels]), loaded.spec)[0]


def closest(
    rows: Float[Tensor, "n d"], query: Float[Tensor, " d"], count: int
) -> list[tuple[int, float]]:
    """The rows of highest cosine with a query, best first, each with its cosine.

    Exact, and the same on any machine: products in fp32 only choose the candidates, whose order is
    that of products without rounding; of equal ones the first row comes first.

    Args:
        rows: Unit rows.
        query: A unit row.
        count: Most rows that are given.

    Raises:
        DataError: A row is not finite.
    """
    count = min(count, len(rows))
    scores = torch.cat([tile @ query for tile in rows.split(_TILE)])
    if not bool(scores.isfinite().all()):
        raise DataError("the search index holds NaN or infinity; remove it, it is made anew")
    least = scores.topk(count).values[-1] - 2 * _rounding(rows.shape[1])
    near = (scores >= least).nonzero()[:, 0]
    exact = torch.cat([similarities(query[None], rows[part])[0] for part in near.split(_TILE)])
    order = exact.sort(descending=True, stable=True).indices[:count]
    return [(int(near[at]), float(exact[at])) for at in order.tolist()]


def _rounding(width: int) -> float:
    """Most by which a product of unit rows in fp32 is off what `similarities` gives.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: width * 2^-24 in
    any order of summation; and what the grid of `similarities` moves the rows by.
    """
    return 1.01 * (width + 2 * width**0.5) * 2.0**-24


def found_in(index: ImageIndex, query: Float[Tensor, " d"], count: int) -> list[Found]:
    """The closest images of an index, best first.

    Raises:
        DataError: The index holds what is no number, or no key.
    """
    found = []
    for row, score in closest(index.image, query, count):
        key, captions = index.name(row)
        found.append(Found(int(index.places[row]), key, score, captions))
    return found
