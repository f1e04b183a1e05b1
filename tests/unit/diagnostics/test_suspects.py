import pytest
import torch

from mmscale.diagnostics.suspects import doubtful_captions, equal_captions, near_images
from tests.unit.diagnostics.faulty_embeddings import healthy, isotropic, joint_collapse


@pytest.mark.parametrize("seed", range(5))
def test_planted_wrong_captions_are_the_doubtful_ones(seed):
    pairs = healthy(0.5)(400, 64, seed)
    wrong = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:12]
    text = pairs.text.clone()
    text[wrong] = text[wrong.roll(1)]
    doubts = doubtful_captions(pairs.image, text, pairs.image_ids, pairs.text_ids)
    assert {doubt.text for doubt in doubts[:12]} == set(wrong.tolist())
    assert len(doubts) <= 14
    assert all(doubt.similarity < doubt.suggested for doubt in doubts[:12])


@pytest.mark.parametrize("make", [isotropic, joint_collapse(0.0)], ids=["untrained", "collapsed"])
def test_a_model_that_knows_nothing_doubts_little(make):
    pairs = make(500, 64, 0)
    sides = pairs.image, pairs.text, pairs.image_ids, pairs.text_ids
    assert len(doubtful_captions(*sides)) <= 2


def test_an_images_other_captions_suggest_nothing():
    """Five equal captions an image: they are no neighbours that could outdo one another."""
    pairs = healthy(0.5)(200, 64, 0)
    text, ids = pairs.text.repeat(5, 1), pairs.text_ids.repeat(5)
    assert not doubtful_captions(pairs.image, text, pairs.image_ids, ids)


def test_images_that_repeat_are_near_and_no_others():
    rows = torch.randn(300, 64)
    rows[7] = rows[250] * 3
    rows[9] = rows[100] + 0.01 * torch.randn(64)
    twins = near_images(rows, 10)
    assert [(pair.first, pair.second) for pair in twins] == [(7, 250), (9, 100)]
    assert twins[0].distance == pytest.approx(0, abs=1e-6)
    assert near_images(rows, 1) == twins[:1]
    assert near_images(torch.ones(50, 8), 10) == []


def test_equal_captions_of_several_images_are_found():
    captions = ["A dog.", "a  DOG.", "A dog.", "Two cats on a mat", "two cats on a mat", "A cow."]
    found = equal_captions(captions, [0, 1, 1, 2, 3, 4])
    assert found == [("Two cats on a mat", [2, 3]), ("A dog.", [0, 1])]
    assert equal_captions(["a", "a"], [0, 0]) == []
