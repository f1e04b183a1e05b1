"""Which queries the model answers best, and which worst: what a gallery of retrievals shows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.diagnostics.pairs import on_grid

FOUND = 3  # candidates that are shown of an answer
_CHUNK = 256


@dataclass(frozen=True)
class Answer:
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
) -> tuple[list[Answer], list[Answer]]:
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
    for rows, ids in zip(torch.split(queries, _CHUNK), torch.split(query_ids, _CHUNK), strict=True):
        similarity = on_grid(rows) @ columns
        right = ids[:, None] == candidate_ids[None, :]
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        rivals = similarity.masked_fill(right, -torch.inf)
        ranks.append(1 + (rivals >= best).sum(dim=1))
        leads.append(best[:, 0] - rivals.amax(dim=1))
    rank, lead = torch.cat(ranks), torch.cat(leads)
    order = sorted(range(len(rank)), key=lambda row: (int(rank[row]), -float(lead[row])))
    chosen = (
        _distinct(order, query_ids, count),
        _distinct(order[::-1], query_ids, count),
    )

    def answer(row: int) -> Answer:
        similarity = (on_grid(queries[row : row + 1]) @ columns)[0]
        right = query_ids[row] == candidate_ids
        first = int(similarity.masked_fill(~right, -torch.inf).argmax())
        values, places = similarity.topk(min(FOUND, len(similarity)))
        return Answer(
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
