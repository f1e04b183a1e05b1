"""Pairs drawn for each update: from the seed and the update alone, each once a pass."""

import torch

from mmscale.contracts import InputSpec
from mmscale.data.drawn import DrawnPairs
from mmscale.data.shards import open_shards

SPEC = InputSpec(8, (0.5,) * 3, (0.5,) * 3, "bicubic", lambda texts: [[1] for _ in texts], 0, 8)
ROWS = 6


def _drawn(place, seed, updates, share=slice(None), workers=0):
    pairs = DrawnPairs(open_shards("an anchor's data", str(place)), SPEC, seed, ROWS, share)
    return list(pairs.batches(updates, workers))


def _seen(batches):
    return [(batch.keys, batch.captions) for batch in batches]


def test_an_update_sees_the_same_pairs_wherever_a_run_begins_and_however_many_ranks_share_them(
    synthetic,
):
    whole = _drawn(synthetic.val, 0, range(9))
    assert _seen(_drawn(synthetic.val, 0, range(5, 9), workers=1)) == _seen(whole[5:])
    halves = [_drawn(synthetic.val, 0, range(9), half) for half in (slice(0, 3), slice(3, 6))]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert first.keys + second.keys == batch.keys
        assert first.captions + second.captions == batch.captions
        assert torch.equal(torch.cat([first.image, second.image]), batch.image)
    assert _seen(_drawn(synthetic.val, 1, range(9))) != _seen(whole)


def test_each_image_comes_once_a_pass_in_another_order_each_time(synthetic):
    samples = open_shards("an anchor's data", str(synthetic.val)).samples
    updates = 2 * samples
    keys = [key for batch in _drawn(synthetic.val, 0, range(updates)) for key in batch.keys]
    passes = [keys[at : at + samples] for at in range(0, len(keys), samples)]
    assert {len(set(one)) for one in passes} == {samples}
    assert passes[0] != passes[1]
