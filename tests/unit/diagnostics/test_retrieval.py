from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch

from mmscale.diagnostics.pairs import Pairs, on_grid, similarities
from mmscale.diagnostics.retrieval import recall_counts, recalls
from mmscale.errors import DataError
from mmscale.parallel.peers import Alone
from tests.unit.diagnostics.faulty_embeddings import (
    healthy,
    isotropic,
    joint_collapse,
    load_features,
)


@dataclass
class Recorder(Alone):
    """One rank of several: remembers what it was asked to sum, answers with what it is told."""

    rank: int
    size: int
    answers: list[torch.Tensor] | None = None

    def __post_init__(self):
        self.asked = []

    def total(self, value):
        self.asked.append(value)
        return value if self.answers is None else self.answers[len(self.asked) - 1]


def with_captions(pairs: Pairs, counts: list[int], noise: float = 0.3) -> Pairs:
    repeats = torch.tensor(counts)
    generator = torch.Generator().manual_seed(5)
    text = pairs.text.repeat_interleave(repeats, dim=0)
    text = text + noise * torch.randn(text.shape, generator=generator) / text.shape[1] ** 0.5
    text = torch.nn.functional.normalize(text)
    return replace(pairs, text=text, text_ids=pairs.text_ids.repeat_interleave(repeats))


def slow_counts(queries, candidates, query_ids, candidate_ids, ks):
    """The protocol, in loops over exact fractions."""
    exact_queries, exact_candidates = (
        [[Fraction(float(v)) for v in row] for row in on_grid(rows)]
        for rows in (queries, candidates)
    )
    counts = [0] * len(ks)
    for query, query_id in zip(exact_queries, query_ids.tolist(), strict=True):
        scored = [
            (sum(a * b for a, b in zip(query, row, strict=True)), other == query_id)
            for row, other in zip(exact_candidates, candidate_ids.tolist(), strict=True)
        ]
        best = max(score for score, right in scored if right)
        rank = 1 + sum(score >= best for score, right in scored if not right)
        counts = [count + (rank <= k) for count, k in zip(counts, ks, strict=True)]
    return counts


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_recall_counts_are_those_of_slow_loops(chunk):
    pairs = with_captions(healthy(2.0)(25, 8, 0), [1, 2, 3, 4, 5] * 5, noise=1.5)
    both = [
        (pairs.image, pairs.text, pairs.image_ids, pairs.text_ids),
        (pairs.text, pairs.image, pairs.text_ids, pairs.image_ids),
    ]
    for arguments in both:
        found = recall_counts(*arguments, ks=(1, 2, 5, 10), chunk=chunk)
        assert found.tolist() == slow_counts(*arguments, (1, 2, 5, 10))
        assert 0 < found[0] < found[-1]


def test_a_collapsed_model_finds_nothing():
    pairs = joint_collapse(0.0)(64, 16, 0)
    figures = recalls(with_captions(pairs, [5] * 64, noise=0.0), Alone())
    assert figures == {
        **{f"{way}_r{k}": 0.0 for way in ("i2t", "t2i") for k in (1, 5, 10)},
        "images": 64,
        "captions": 320,
    }


def test_tied_wrong_candidates_count_against_the_query():
    a, b = [1.0, 0.0], [0.0, 1.0]
    queries = torch.tensor([a, a, b])
    candidates = torch.tensor([a, a, b, a])
    # Wrong candidates as good as the best right one: two for the first query, one, none.
    counts = recall_counts(
        queries,
        candidates,
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 1, 2, 1]),
        ks=(1, 2, 3),
    )
    assert counts.tolist() == [1, 2, 3]


def test_a_copied_row_ties_wherever_it_stands():
    pairs = isotropic(3000, 96, 0)
    candidates = pairs.text.clone()
    candidates[1500:] = candidates[:1500]
    ids = pairs.image_ids
    # Every right candidate has a wrong twin, so none can be first.
    for chunk in (1, 33, 256, 3000):
        assert recall_counts(pairs.image[:99], candidates, ids[:99], ids, (1,), chunk).item() == 0
        same = recall_counts(candidates[:99], candidates, ids[:99], ids, (1, 2), chunk)
        assert same.tolist() == [0, 99]


def test_similarities_are_exact():
    pairs = isotropic(6, 300, 0)
    exact = [
        [
            sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y, strict=True))
            for y in on_grid(pairs.text)
        ]
        for x in on_grid(pairs.image)
    ]
    found = similarities(pairs.image, pairs.text)
    assert [[Fraction(v) for v in row] for row in found.tolist()] == exact
    assert torch.allclose(found, pairs.image.double() @ pairs.text.double().T, atol=1e-6)


def test_recalls_of_real_features_are_the_recorded_ones(real_data):
    figures = recalls(load_features(real_data, "features_clip.npy"), Alone())
    assert figures["i2t_r1"] == pytest.approx(55.2)
    assert figures["t2i_r1"] == pytest.approx(50.6)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_the_queries(size):
    pairs = with_captions(healthy(1.5)(23, 16, 0), [1 + i % 5 for i in range(23)], noise=1.0)
    alone = recalls(pairs, Alone())
    ranks = [Recorder(rank, size) for rank in range(size)]
    for rank in ranks:
        recalls(pairs, rank)
    totals = [sum(parts) for parts in zip(*(rank.asked for rank in ranks), strict=True)]
    for rank in range(size):
        assert recalls(pairs, Recorder(rank, size, totals)) == alone


def test_recalls_add_up_with_more_ranks_than_queries():
    pairs = healthy(0.2)(3, 16, 0)
    assert sum(recalls(pairs, Recorder(rank, 5))["i2t_r1"] for rank in range(5)) == pytest.approx(
        100
    )


def test_an_image_in_several_rows_counts_once():
    once = with_captions(healthy(1.5)(30, 16, 0), [5] * 30, noise=1.0)
    flat = replace(
        once, image=once.image.repeat_interleave(5, dim=0), image_ids=once.text_ids.clone()
    )
    assert recalls(flat, Alone()) == recalls(once, Alone())
    assert recalls(flat, Alone())["images"] == 30


def test_fewer_candidates_than_k():
    assert recalls(healthy(0.2)(3, 16, 0), Alone())["t2i_r10"] == 100


def test_recall_refuses_an_image_or_caption_without_partner():
    pairs = healthy(0.2)(8, 16, 0)
    with pytest.raises(DataError, match="image has no caption"):
        recalls(replace(pairs, text=pairs.text[1:], text_ids=pairs.text_ids[1:]), Alone())
    with pytest.raises(DataError, match="caption has no image"):
        recalls(replace(pairs, image=pairs.image[1:], image_ids=pairs.image_ids[1:]), Alone())


def test_rows_of_nan_find_nothing_and_recalls_refuse_them():
    pairs = healthy(0.2)(8, 16, 0)
    broken = torch.full_like(pairs.image, torch.nan)
    counts = recall_counts(broken, pairs.text, pairs.image_ids, pairs.text_ids)
    assert counts[:2].tolist() == [0, 0]
    with pytest.raises(DataError, match="NaN"):
        recalls(replace(pairs, image=broken), Alone())
