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


def test_suggestions_leave_out_the_image_and_its_own_captions():
    """One of three captions is another image's; the two right ones must not speak for it."""
    pairs = healthy(0.5)(200, 64, 0)
    owner = torch.arange(200).repeat_interleave(3)
    text = pairs.text[owner]
    text[[30, 333]] = text[[333, 30]]
    doubts = doubtful_captions(pairs.image, text, pairs.image_ids, pairs.image_ids[owner])
    assert {doubt.text for doubt in doubts} == {30, 333}
    similarity = (text @ pairs.image.T).double()
    similarity[torch.arange(600), owner] = -torch.inf
    for doubt in doubts:
        near_images = similarity[doubt.text].topk(10).values.mean()
        near_captions = similarity[:, doubt.image].topk(10).values.mean()
        assert doubt.suggested == pytest.approx(float(near_images + near_captions) / 2, abs=1e-6)


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
