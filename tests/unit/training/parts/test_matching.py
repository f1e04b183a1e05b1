"""Hard negatives follow softmax, never share an id, and repeat."""

from dataclasses import replace

import pytest
import torch

from mmscale.contracts import Features
from mmscale.training.parts.matching import Matching, hard_negatives
from tests.ranks.tiny import ROWS, joint_batch


class Recorder:
    """A model's forward that keeps the pairs that it is asked for."""

    def __call__(self, mode, image, text, mask, images, texts, at_once):
        assert mode == "fuse"
        self.pairs, self.at_once = (images, texts), at_once
        marks = torch.arange(len(images)).float()
        return torch.stack([marks, -marks], 1), None


def judged(batch, similarity, seed=0, step=0, micro=ROWS, negatives=True):
    engine = Recorder()
    features = Features(torch.zeros(ROWS, 1), torch.zeros(ROWS, 1))
    matching = Matching(engine, seed, micro, negatives)
    return engine, matching.match(batch, features, similarity, step)


def test_draws_have_the_frequencies_of_softmax():
    torch.manual_seed(0)
    logits = torch.randn(1, 6).double() * 2
    negative = torch.tensor([[False, True, True, False, True, True]])
    count = 20_000
    draws = (torch.arange(count).double() + 0.5) / count
    drawn = hard_negatives(logits.expand(count, 6), negative.expand(count, 6), draws)
    wanted = logits.masked_fill(~negative, -torch.inf).softmax(1)[0]
    found = torch.bincount(drawn, minlength=6) / count
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_a_masked_column_is_never_drawn(draw, scale):
    torch.manual_seed(0)
    for width in range(2, 30):
        logits = scale * torch.randn(width, width)
        negative = ~torch.eye(width, dtype=torch.bool)
        negative[:, 0] = negative[:, -1] = False
        chosen = hard_negatives(logits, negative, torch.full((width,), draw))
        for row, column in enumerate(chosen.tolist()):
            assert negative[row, column] or not negative[row].any()


def test_each_row_gives_its_pair_and_a_negative_each_way():
    batch = joint_batch()
    engine, matched = judged(batch, torch.randn(ROWS, ROWS))
    images, texts = engine.pairs
    own = torch.arange(ROWS)
    assert torch.equal(images, torch.cat([own, own, images[-ROWS:]]))
    assert torch.equal(texts[:ROWS], own)
    assert torch.equal(texts[-ROWS:], own)
    same = batch.match_ids[images] == batch.match_ids[texts]
    assert torch.equal(same.long(), matched.targets)
    assert matched.targets.sum() == ROWS


def test_rows_without_a_negative_give_their_own_pair_only():
    batch = joint_batch()
    batch = replace(batch, match_ids=torch.zeros_like(batch.match_ids))
    engine, matched = judged(batch, torch.randn(ROWS, ROWS))
    assert len(engine.pairs[0]) == 3 * ROWS, "ranks must make equal calls"
    assert matched.targets.tolist() == [1] * ROWS
    assert torch.equal(matched.logits[:, 0], torch.arange(ROWS).float())


def test_draws_follow_from_seed_step_and_key():
    batch, similarity = joint_batch(), torch.zeros(ROWS, ROWS)
    pairs = [torch.stack(judged(batch, similarity, **k)[0].pairs) for k in ({}, {}, {"micro": 2})]
    assert torch.equal(pairs[0], pairs[1])
    assert torch.equal(pairs[0], pairs[2])
    for other in ({"seed": 1}, {"step": 1}):
        assert not torch.equal(pairs[0], torch.stack(judged(batch, similarity, **other)[0].pairs))
    renamed = replace(batch, keys=[f"other-{key}" for key in batch.keys])
    assert not torch.equal(pairs[0], torch.stack(judged(renamed, similarity)[0].pairs))


def test_memory_is_bounded_by_the_chunk_and_classes_need_no_negatives():
    batch, similarity = joint_batch(), torch.zeros(ROWS, ROWS)
    assert judged(batch, similarity)[0].at_once is None
    assert judged(batch, similarity, micro=4)[0].at_once == 4
    engine, matched = judged(batch, similarity, negatives=False)
    assert torch.equal(*engine.pairs)
    assert matched.targets.tolist() == [1] * ROWS
