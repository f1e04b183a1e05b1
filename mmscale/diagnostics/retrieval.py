"""Retrieval by the Karpathy protocol, shared out over ranks: recalls, and each query's rank.

A query is found at K if any candidate with its id is among the first K. Ties count against the
model, so embeddings that are all the same find nothing at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmscale.contracts import Peers
from mmscale.diagnostics.pairs import Pairs, distinct_rows, on_grid, require_finite
from mmscale.errors import DataError

TOP = (1, 5, 10)
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in TOP)


def recalls(pairs: Pairs, peers: Peers) -> dict[str, float | int]:
    """Recalls in both directions in percent, and how many images and captions were searched.

    Every rank holds all rows, ranks its share of the queries, and returns the same figures. An
    image whose id occurs in several rows is searched once, by its first row.

    Args:
        pairs: On the device that `peers` exchanges tensors on.
        peers: The ranks that share the work.

    Raises:
        DataError: An image has no caption, a caption no image, or a row is not finite.
    """
    require_finite(pairs)
    distinct = distinct_rows(pairs.image_ids)
    images, image_ids = pairs.image[distinct], pairs.image_ids[distinct]
    directions = {
        "i2t": ((images, image_ids), (pairs.text, pairs.text_ids)),
        "t2i": ((pairs.text, pairs.text_ids), (images, image_ids)),
    }
    if not bool(torch.isin(image_ids, pairs.text_ids).all()):
        raise DataError("retrieval: an image has no caption with its id; leave such images out")
    if not bool(torch.isin(pairs.text_ids, image_ids).all()):
        raise DataError("retrieval: a caption has no image with its id; leave such captions out")
    figures: dict[str, float | int] = {}
    for name, ((queries, query_ids), (candidates, candidate_ids)) in directions.items():
        mine = _share(len(queries), peers)
        counts = recall_counts(queries[mine], candidates, query_ids[mine], candidate_ids)
        found = peers.total(counts.double()) / len(queries)
        figures |= {f"{name}_r{k}": 100 * float(v) for k, v in zip(TOP, found, strict=True)}
    return figures | {"images": len(images), "captions": len(pairs.text)}


def recall_counts(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_ids: Int64[Tensor, " q"],
    candidate_ids: Int64[Tensor, " c"],
    ks: Sequence[int] = TOP,
    chunk: int = 256,
) -> Int64[Tensor, " ks"]:
    """How many queries have a candidate of their id among the first k, for each k.

    The rank of a query is 1 + the number of wrong candidates at least as similar as its best right
    one. A query without a right candidate is not found.

    Args:
        queries: Unit rows.
        candidates: Unit rows.
        query_ids: Identity of each query.
        candidate_ids: Identity of each candidate; equal ids belong together.
        ks: Lengths of the list that is looked at.
        chunk: Queries compared at once; the counts do not depend on it.
    """
    limits = torch.tensor(ks, device=queries.device)
    counts = torch.zeros(len(ks), dtype=torch.int64, device=queries.device)
    for similarity, right in _compared(queries, candidates, query_ids, candidate_ids, chunk):
        counts += _found(similarity, right, limits).sum(dim=0)
    return counts


def _compared(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_ids: Int64[Tensor, " q"],
    candidate_ids: Int64[Tensor, " c"],
    chunk: int,
) -> Iterator[tuple[Float[Tensor, "k c"], Bool[Tensor, "k c"]]]:
    """Similarities of so many queries at once to all candidates, and which of these are right."""
    columns = on_grid(candidates).T
    for rows, ids in zip(torch.split(queries, chunk), torch.split(query_ids, chunk), strict=True):
        yield on_grid(rows) @ columns, ids[:, None] == candidate_ids[None, :]


def _best_and_ahead(
    values: Float[Tensor, "q c"], right: Bool[Tensor, "q c"]
) -> tuple[Float[Tensor, "q 1"], Int64[Tensor, "q 1"]]:
    """The best right candidate's value, and how many wrong ones are at least as high."""
    best = values.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    # Not "at least as high", so that a NaN counts against the model too.
    return best, (~(values < best) & ~right).sum(dim=1, keepdim=True)


def _found(
    values: Float[Tensor, "q c"], right: Bool[Tensor, "q c"], limits: Int64[Tensor, " ks"]
) -> Bool[Tensor, "q ks"]:
    """Whether fewer wrong candidates than each limit are at least as high as the best right one."""
    _, ahead = _best_and_ahead(values, right)
    return (ahead < limits) & right.any(dim=1, keepdim=True)


def _share(rows: int, peers: Peers) -> slice:
    return slice(rows * peers.rank // peers.size, rows * (peers.rank + 1) // peers.size)


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
        hits = _found(values, right, torch.tensor(TOP, device=values.device))
        for top, share in zip(TOP, hits.double().mean(dim=0).tolist(), strict=True):
            figures[f"rerank_{direction}_r{top}"] = 100 * share
    return figures


def _first(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_ids: Int64[Tensor, " q"],
    candidate_ids: Int64[Tensor, " c"],
    k: int,
    chunk: int,
) -> Int64[Tensor, "q k"]:
    return torch.cat(
        [
            (similarity - HALF_A_TIE * right).topk(min(k, len(candidates)), dim=1).indices
            for similarity, right in _compared(queries, candidates, query_ids, candidate_ids, chunk)
        ]
    )


def _right(pairs: Pairs, images: Tensor, captions: Tensor) -> Tensor:
    return pairs.image_ids[images] == pairs.text_ids[captions]


FOUND = 3  # candidates that are shown of an answer
_CHUNK = 256


@dataclass(frozen=True)
class QueryRank:
    """What one query found.

    Attributes:
        query: Its row.
        rank: Place of the first right candidate; ties count against the model.
        right: Row of that candidate.
        similarity: Cosine of the query and that candidate.
        found: Rows of the first candidates.
        similarities: Their cosines.
    """

    query: int
    rank: int
    right: int
    similarity: float
    found: tuple[int, ...]
    similarities: tuple[float, ...]


def best_and_worst(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_ids: Int64[Tensor, " q"],
    candidate_ids: Int64[Tensor, " c"],
    count: int,
) -> tuple[list[QueryRank], list[QueryRank]]:
    """The best answers, the best first, and the worst, the worst first.

    An id has one query in each list. An answer is better if the right candidate's rank is lower,
    and of equal ranks if its lead over the first wrong candidate is larger.

    Args:
        queries: Unit rows, on the CPU as all others.
        candidates: Unit rows.
        query_ids: Identity of each query; each has a candidate of the same.
        candidate_ids: Identity of each candidate.
        count: Answers in each list, at most.
    """
    columns = on_grid(candidates).T
    ranks, leads = [], []
    for similarity, right in _compared(queries, candidates, query_ids, candidate_ids, _CHUNK):
        best, ahead = _best_and_ahead(similarity, right)
        ranks.append(1 + ahead[:, 0])
        leads.append(best[:, 0] - similarity.masked_fill(right, -torch.inf).amax(dim=1))
    rank, lead = torch.cat(ranks), torch.cat(leads)
    order = sorted(range(len(rank)), key=lambda row: (int(rank[row]), -float(lead[row])))
    chosen = (
        _distinct(order, query_ids, count),
        _distinct(order[::-1], query_ids, count),
    )

    def answer(row: int) -> QueryRank:
        similarity = (on_grid(queries[row : row + 1]) @ columns)[0]
        right = query_ids[row] == candidate_ids
        first = int(similarity.masked_fill(~right, -torch.inf).argmax())
        values, places = similarity.topk(min(FOUND, len(similarity)))
        return QueryRank(
            row,
            int(rank[row]),
            first,
            float(similarity[first]),
            tuple(places.tolist()),
            tuple(values.tolist()),
        )

    best_answers, worst_answers = ([answer(row) for row in rows] for rows in chosen)
    return best_answers, worst_answers


def _distinct(order: list[int], ids: Tensor, count: int) -> list[int]:
    """The first rows in an order, one an id."""
    rows: dict[int, int] = {}
    for row in order:
        rows.setdefault(int(ids[row]), row)
        if len(rows) == count:
            break
    return list(rows.values())
