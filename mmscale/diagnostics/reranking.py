"""Recall after the fusion model has put each query's first candidates in another order."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.diagnostics.pairs import Pairs, distinct_rows
from mmscale.diagnostics.retrieval import TOP
from mmscale.diagnostics.similarity import on_grid

# Less than the distance of two similarities on the grid (2^-48), and exact in float64 below 1.
HALF_A_TIE = 2.0**-52


@dataclass(frozen=True)
class Shortlists:
    """The first k candidates of every query by the dual encoder.

    Attributes:
        images: Rows of the images that are searched: the first of each id.
        captions: For each of them, rows of its captions.
        images_of: For each caption, rows of its images.
    """

    images: Int64[Tensor, " q"]
    captions: Int64[Tensor, "q k"]
    images_of: Int64[Tensor, "m j"]

    def wanted(self) -> Int64[Tensor, "pairs 2"]:
        """Every pair of either direction once, in order: row of the image, row of the caption."""
        ours = torch.stack([self.images[:, None].expand_as(self.captions), self.captions], -1)
        rows = torch.arange(len(self.images_of))[:, None].expand_as(self.images_of)
        theirs = torch.stack([self.images_of, rows], -1)
        return torch.cat([ours.reshape(-1, 2), theirs.reshape(-1, 2)]).unique(dim=0)


def shortlists(pairs: Pairs, k: int, chunk: int = 256) -> Shortlists:
    """The k most similar candidates of every query; a right one loses a tie for the last place."""
    images = distinct_rows(pairs.image_ids)
    rows, ids = pairs.image[images], pairs.image_ids[images]
    captions = _first(rows, pairs.text, ids, pairs.text_ids, k, chunk)
    images_of = images[_first(pairs.text, rows, pairs.text_ids, ids, k, chunk)]
    return Shortlists(images, captions, images_of)


def reranked_recalls(
    pairs: Pairs, lists: Shortlists, scores: Float[Tensor, " pairs"]
) -> dict[str, float]:
    """Recalls in percent with each shortlist ordered by score, `rerank_i2t_r1` and so on.

    A query whose shortlist holds no right candidate is not found; ties count against the model.

    Args:
        pairs: What the shortlists were made from.
        lists: With at least as many candidates as the longest list that is looked at.
        scores: Of `lists.wanted()`; higher is a better match.
    """
    wanted = lists.wanted()
    keys = wanted[:, 0] * len(pairs.text) + wanted[:, 1]

    def score(images: Tensor, captions: Tensor) -> Tensor:
        return scores[torch.searchsorted(keys, images * len(pairs.text) + captions)]

    rows = torch.arange(len(lists.images_of))[:, None].expand_as(lists.images_of)
    chosen = lists.images[:, None].expand_as(lists.captions)
    found = {
        "i2t": (score(chosen, lists.captions), _right(pairs, chosen, lists.captions)),
        "t2i": (score(lists.images_of, rows), _right(pairs, lists.images_of, rows)),
    }
    figures = {}
    for direction, (values, right) in found.items():
        best = values.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ahead = (~(values < best) & ~right).sum(1)
        for top in TOP:
            hits = (ahead < top) & right.any(1)
            figures[f"rerank_{direction}_r{top}"] = 100 * float(hits.double().mean())
    return figures


def _first(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_ids: Int64[Tensor, " q"],
    candidate_ids: Int64[Tensor, " c"],
    k: int,
    chunk: int,
) -> Int64[Tensor, "q k"]:
    columns, found = on_grid(candidates).T, []
    for rows, ids in zip(queries.split(chunk), query_ids.split(chunk), strict=True):
        right = ids[:, None] == candidate_ids[None, :]
        similarity = on_grid(rows) @ columns - HALF_A_TIE * right
        found.append(similarity.topk(min(k, len(candidates)), dim=1).indices)
    return torch.cat(found)


def _right(pairs: Pairs, images: Tensor, captions: Tensor) -> Tensor:
    return pairs.image_ids[images] == pairs.text_ids[captions]
