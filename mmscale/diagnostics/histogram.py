"""How similar matched and unmatched pairs are, as counts for the report."""

from typing import Any

import torch
from torch import Tensor

from mmscale.diagnostics.pairs import Pairs, thinned_rows
from mmscale.diagnostics.similarity import on_grid

BINS = 80
LARGEST_SAMPLE = 512
_CHUNK = 256


def similarity_histogram(pairs: Pairs) -> dict[str, Any]:
    """Counts of cosines of matched and unmatched pairs over the same bins, ready for JSON.

    At most `LARGEST_SAMPLE` distinct images, taken evenly, are compared with their captions and
    those of one another; `images` and `captions` say how many.
    """
    chosen, texts = thinned_rows(pairs, LARGEST_SAMPLE)
    image_ids, text_ids = pairs.image_ids.cpu()[chosen], pairs.text_ids.cpu()[texts]
    images, captions = on_grid(pairs.image.cpu()[chosen]), on_grid(pairs.text.cpu()[texts])
    low, high = _bounds(images, captions)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ("matched", "unmatched")}
    for rows, ids in zip(torch.split(images, _CHUNK), torch.split(image_ids, _CHUNK), strict=True):
        similarity = rows @ captions.T
        matched = ids[:, None] == text_ids[None, :]
        for name, cells in (("matched", matched), ("unmatched", ~matched)):
            counts[name] += torch.histogram(similarity[cells], edges).hist
    described = {
        name: {"edges": edges.tolist(), "counts": [int(v) for v in values]}
        for name, values in counts.items()
    }
    return described | {
        "width": pairs.image.shape[1],
        "images": len(images),
        "captions": len(captions),
    }


def _bounds(images: Tensor, captions: Tensor) -> tuple[float, float]:
    """Least and greatest cosine, widened: bins need a width even if all cosines are equal."""
    extremes = [torch.stack((rows @ captions.T).aminmax()) for rows in torch.split(images, _CHUNK)]
    low, high = float(torch.stack(extremes)[:, 0].min()), float(torch.stack(extremes)[:, 1].max())
    return low - 1e-3, high + 1e-3
