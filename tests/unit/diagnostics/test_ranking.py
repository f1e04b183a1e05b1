import torch

from mmscale.diagnostics.retrieval import best_and_worst, recall_counts
from tests.unit.diagnostics.faulty_embeddings import healthy


def rows(*angles):
    """Unit rows in the plane, by degrees."""
    radians = torch.tensor(angles).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_answers_are_ordered_by_rank_and_then_by_lead():
    queries, candidates = rows(0.0, 90.0, 180.0), rows(0.0, 70.0, 40.0)
    ids = torch.tensor([5, 6, 7])
    best, worst = best_and_worst(queries, candidates, ids, ids, 3)
    # 0 degrees finds its own at 0; 90 its own at 70; 180 finds 70 before its own at 40.
    assert [(answer.query, answer.rank) for answer in best] == [(1, 1), (0, 1), (2, 2)]
    assert [answer.query for answer in worst] == [2, 0, 1]
    assert best[0].found == (1, 2, 0)
    assert worst[0].found == (1, 2, 0)
    assert worst[0].right == 2
    assert torch.allclose(
        torch.tensor(best[0].similarities),
        torch.tensor([70.0, 40.0, 0.0]).deg2rad().sin(),
        atol=1e-6,
    )


def test_best_and_worst_list_each_id_once():
    pairs = healthy(0.7)(20, 16, 0)
    text, text_ids = pairs.text.repeat(3, 1), pairs.text_ids.repeat(3)
    for answers in best_and_worst(text, pairs.image, text_ids, pairs.image_ids, 20):
        assert sorted(int(text_ids[answer.query]) for answer in answers) == list(range(20))


def test_best_and_worst_ranks_agree_with_the_recall_counts():
    pairs = healthy(2.5)(300, 16, 0)
    sides = pairs.image, pairs.text, pairs.image_ids, pairs.text_ids
    best, _ = best_and_worst(*sides, 300)
    for k, count in zip((1, 5, 10), recall_counts(*sides).tolist(), strict=True):
        assert sum(answer.rank <= k for answer in best) == count


def test_a_tie_counts_against_the_model():
    equal = rows(0.0, 0.0, 0.0)
    best, _ = best_and_worst(equal, equal, torch.arange(3), torch.arange(3), 1)
    assert best[0].rank == 3
