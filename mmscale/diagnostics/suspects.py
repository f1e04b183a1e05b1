"""Pairs of a data set to look at: captions that hardly fit, images or captions that repeat.

Found by a trained model; one that has learnt nothing finds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mmscale.data.caption_text import wording
from mmscale.diagnostics.pairs import on_grid

_NEIGHBOURS = 10
_CHUNK = 256
# A caption is named if it lies so many robust deviations from the median.
_DEVIATIONS = 4.0
# Images nearer than this share of the usual distance are candidates for being the same one.
_NEAR = 0.05


@dataclass(frozen=True)
class DoubtfulCaption:
    """A caption that fits its image far less than its neighbours would.

    Attributes:
        image: Row of the image.
        text: Row of the caption.
        similarity: Cosine of the two.
        suggested: What images near this caption and captions near this image have.
        deviations: How far that distance lies from the median of all captions.
    """

    image: int
    text: int
    similarity: float
    suggested: float
    deviations: float


@dataclass(frozen=True)
class NearImages:
    """Two images under different ids that lie next to each other.

    Attributes:
        first: Row of an image.
        second: Row of the other.
        distance: 1 - cosine, as a share of the mean over all images.
    """

    first: int
    second: int
    distance: float


def doubtful_captions(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "m d"],
    image_ids: Int64[Tensor, " n"],
    text_ids: Int64[Tensor, " m"],
) -> list[DoubtfulCaption]:
    """Captions that stand out, the most doubtful first; one an image.

    A pair's similarity is read against the mean similarity of the caption with the images nearest
    to it and of the image with the captions nearest to it, as CSLS scales it.

    Source: Conneau et al. 2018 (arXiv 1710.04087), section 2.3.

    Args:
        image: Unit rows of images with distinct ids.
        text: Unit rows.
        image_ids: Identity of each image.
        text_ids: Identity of each caption; all occur among the images.
    """
    k = min(_NEIGHBOURS, len(image) - 1)
    if k < 1:
        return []
    order = image_ids.argsort()
    owner = order[torch.searchsorted(image_ids[order], text_ids)]
    columns = on_grid(image).T
    near_image = torch.full((len(image), k), -torch.inf, dtype=torch.float64)
    own, near_text = [], []
    for rows, owners in zip(torch.split(text, _CHUNK), torch.split(owner, _CHUNK), strict=True):
        similarity = on_grid(rows) @ columns
        own.append(similarity.gather(1, owners[:, None])[:, 0])
        # A pair's own similarity, and those of the image's other captions, suggest nothing.
        similarity.scatter_(1, owners[:, None], -torch.inf)
        near_text.append(similarity.topk(k, dim=1).values.mean(dim=1))
        near_image = torch.cat([near_image, similarity.T], dim=1).topk(k, dim=1).values
    similarity, suggested = (
        torch.cat(own),
        (torch.cat(near_text) + near_image.mean(dim=1)[owner]) / 2,
    )
    deviations = _robust_deviations(suggested - similarity)
    doubts: dict[int, DoubtfulCaption] = {}
    for row in deviations.argsort(descending=True).tolist():
        if deviations[row] < _DEVIATIONS:
            break
        values = (float(values[row]) for values in (similarity, suggested, deviations))
        doubts.setdefault(int(owner[row]), DoubtfulCaption(int(owner[row]), row, *values))
    return list(doubts.values())


def near_images(rows: Float[Tensor, "n f"], count: int) -> list[NearImages]:
    """Pairs of images much nearer than usual, the nearest first, each image with its nearest.

    Args:
        rows: Features or embeddings of images with distinct ids, of any length.
        count: Pairs at most.
    """
    if len(rows) < 3:
        return []
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    mean = unit.mean(dim=0)
    num = len(unit)
    usual = 1 - (num**2 * float(mean @ mean) - num) / (num * (num - 1))
    # Where all rows are alike none of them is another's twin.
    if usual < 1e-6:
        return []
    pairs: dict[tuple[int, int], float] = {}
    for start in range(0, num, _CHUNK):
        cosines = unit[start : start + _CHUNK] @ unit.T
        places = torch.arange(len(cosines))
        cosines[places, places + start] = -torch.inf
        nearest = cosines.max(dim=1)
        for row, (value, other) in enumerate(
            zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True), start
        ):
            distance = max(0.0, 1 - value) / usual
            if distance < _NEAR:
                pairs[min(row, other), max(row, other)] = distance
    found = sorted(pairs.items(), key=lambda pair: (pair[1], pair[0]))
    return [NearImages(*rows, distance) for rows, distance in found[:count]]


def equal_captions(captions: Sequence[str], owners: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Captions that several images share, the longest first, each with its images.

    Args:
        captions: Texts; case and spaces make no difference.
        owners: Image of each.
    """
    groups: dict[str, dict[int, str]] = {}
    for caption, owner in zip(captions, owners, strict=True):
        groups.setdefault(wording(caption), {}).setdefault(owner, caption)
    shared = [
        (next(iter(group.values())), list(group)) for group in groups.values() if len(group) > 1
    ]
    return sorted(shared, key=lambda entry: (-len(entry[0]), entry[0]))


def _robust_deviations(values: Float64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """Distance from the median in units of a normal law's deviation; 0 where nothing varies."""
    middle = values.median()
    spread = 1.4826 * float((values - middle).abs().median())
    return (values - middle) / spread if spread > 1e-9 else torch.zeros_like(values)
