"""Pairs drawn for each update: from the seed and the update alone, each once a pass."""

from dataclasses import replace

import torch

from mmscale.contracts import InputSpec
from mmscale.data.drawn import DrawnPairs
from mmscale.data.features import FeatureTable, SampleBatches
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


def _table(shards):
    """A row a sample: its pixels' mean and its place; a row a caption: its number in the set."""
    samples = SampleBatches(shards, SPEC, range(shards.samples), shards.samples)[0]
    captions = [len(each) for each in samples.captions]
    texts = [caption for each in samples.captions for caption in each]
    return FeatureTable(
        image=samples.pixels.float().mean((1, 2, 3))[:, None],
        text=torch.arange(len(texts))[:, None].float(),
        first=torch.tensor([0, *captions]).cumsum(0),
        image_ids=torch.tensor(samples.image_ids),
        good=torch.ones(shards.samples, dtype=torch.bool),
        cut=torch.zeros(len(texts), dtype=torch.bool),
        keys=samples.keys,
        captions=texts,
        damaged=[],
    )


def test_a_table_of_features_gives_the_same_pairs(synthetic):
    shards = open_shards("an anchor's data", str(synthetic.val))
    table = _table(shards)
    pairs = DrawnPairs(shards, SPEC, 0, ROWS, slice(0, 3), table)
    decoded = _drawn(synthetic.val, 0, range(9), slice(0, 3))
    kept = list(pairs.batches(range(9), 0))
    assert _seen(kept) == _seen(decoded)
    for ours, theirs in zip(kept, decoded, strict=True):
        assert ours.mask is None
        assert torch.equal(ours.match_ids, theirs.match_ids)
        assert torch.equal(ours.image[:, 0], theirs.image.float().mean((1, 2, 3)))
        assert [table.captions[int(row)] for row in ours.tokens[:, 0]] == ours.captions
    # Where a picture was damaged, the next one stands in for it, as where they are decoded.
    first = table.keys.index(kept[0].keys[0])
    good = table.good.clone()
    good[first] = False
    pairs = DrawnPairs(shards, SPEC, 0, ROWS, slice(0, 3), replace(table, good=good))
    (batch,) = pairs.batches(range(1), 0)
    assert batch.keys == [table.keys[(first + 1) % len(good)], *kept[0].keys[1:]]
