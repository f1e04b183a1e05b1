"""Re-ranked recall against loops over the definition."""

import pytest
import torch
import torch.nn.functional as F

from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import recalls, reranked_recalls, shortlists
from mmscale.parallel.peers import Alone

IMAGES, CAPTIONS_EACH, WIDTH, K = 30, 3, 8, 12


def pairs(noise=0.8):
    generator = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=1)
    text = image.repeat_interleave(CAPTIONS_EACH, 0)
    text = F.normalize(text + noise * torch.randn(text.shape, generator=generator), dim=1)
    ids = torch.randperm(IMAGES, generator=generator)
    # The first image is there twice: it is searched once.
    return Pairs(
        torch.cat([image, image[:1]]),
        text,
        torch.cat([ids, ids[:1]]),
        ids.repeat_interleave(CAPTIONS_EACH),
    )


def by_definition(given, score):
    """R@1, 5 and 10 both ways, one query at a time."""
    similarity = given.image[:IMAGES].double() @ given.text.double().T
    right = given.image_ids[:IMAGES, None] == given.text_ids
    figures = {}
    for way, (table, good) in {"i2t": (similarity, right), "t2i": (similarity.T, right.T)}.items():
        ranks = []
        for query in range(len(table)):
            listed = sorted(range(table.shape[1]), key=lambda c: -table[query, c])[:K]
            scored = score[query] if way == "i2t" else score[:, query]
            values = {c: scored[c].item() for c in listed}
            own = [values[c] for c in listed if good[query, c]]
            wrong = [values[c] for c in listed if not good[query, c]]
            ranks.append(sum(value >= max(own) for value in wrong) if own else K)
        for top in (1, 5, 10):
            figures[f"rerank_{way}_r{top}"] = 100 * sum(r < top for r in ranks) / len(ranks)
    return figures


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_reranked_recalls_are_those_of_slow_loops(chunk):
    given, score = pairs(), torch.randn(IMAGES, IMAGES * CAPTIONS_EACH)
    score[torch.rand_like(score) < 0.2] = 0.5  # some ties
    lists = shortlists(given, K, chunk)
    wanted = lists.wanted()
    assert len(wanted.unique(dim=0)) == len(wanted) < 2 * K * len(given.text)
    figures = reranked_recalls(given, lists, score[wanted[:, 0], wanted[:, 1]])
    assert figures == pytest.approx(by_definition(given, score))
    assert 0 < figures["rerank_i2t_r1"] < 100


def test_reranking_by_the_dual_encoders_own_score_changes_no_recall():
    given = pairs()
    lists = shortlists(given, K)
    wanted = lists.wanted()
    own = (given.image[wanted[:, 0]].double() * given.text[wanted[:, 1]].double()).sum(1)
    figures, plain = reranked_recalls(given, lists, own), recalls(given, Alone())
    assert {name: plain[name.removeprefix("rerank_")] for name in figures} == figures


def test_equal_scores_and_equal_rows_find_nothing():
    given = pairs()
    lists = shortlists(given, K)
    same = reranked_recalls(given, lists, torch.zeros(len(lists.wanted())))
    assert same["rerank_t2i_r10"] == 0
    collapsed = Pairs(
        torch.ones_like(given.image) / WIDTH**0.5,
        torch.ones_like(given.text) / WIDTH**0.5,
        given.image_ids,
        given.text_ids,
    )
    lists = shortlists(collapsed, K)
    right = collapsed.image_ids[lists.images_of] == collapsed.text_ids[:, None]
    assert not right.any(), "a right candidate wins no tie for the last place"


def test_reranking_by_an_oracle_finds_every_pair_in_the_shortlists():
    given = pairs()
    lists = shortlists(given, K)
    wanted = lists.wanted()
    right = given.image_ids[wanted[:, 0]] == given.text_ids[wanted[:, 1]]
    figures = reranked_recalls(given, lists, right.float())
    held = (given.image_ids[lists.images_of] == given.text_ids[:, None]).any(1)
    assert figures["rerank_t2i_r1"] == pytest.approx(100 * held.float().mean().item())
