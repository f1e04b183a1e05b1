"""Design principle 2: rows follow from the position, at every world and worker count."""

from itertools import islice

import pytest
import torch

from mmscale.contracts import InputSpec, Position, World
from mmscale.data.features import CachedStream, FeatureTable
from mmscale.data.shards import SampleReader, open_shards
from mmscale.data.stream import TrainStream, plan_schedule
from mmscale.engine.plan import plan_batch

BATCHES = 3
BATCH = 16
BEGINNING = Position()
CASES = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 2)]
SPEC = InputSpec(
    image_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bicubic",
    tokenize=lambda captions: [[1, *map(ord, caption[:20])] for caption in captions],
    pad_token=0,
    context_length=32,
)


def _parts(synthetic, workers, captions="random"):
    """Configuration, shards and the order, as a run puts them together."""
    config = synthetic.config(
        f"data.workers={workers}",
        f"data.captions={captions}",
        f"train.global_batch_size={BATCH}",
        "data.shuffle_buffer=40",
    )
    shards = open_shards("data.train", config.data.train)
    lanes = plan_batch(config, 4).lanes
    return config, shards, plan_schedule(config, [s.captions for s in shards.shards], lanes)


def _joint(synthetic, world, workers, start=BEGINNING, count=BATCHES, captions="random"):
    """Some global batches: the rows of all ranks laid end to end, and the position after each."""
    config, shards, schedule = _parts(synthetic, workers, captions)
    ranks = [
        list(
            islice(
                TrainStream(config, shards, schedule, SPEC, World(rank, world)).batches(start),
                count,
            )
        )
        for rank in range(world)
    ]
    batches = []
    for parts in zip(*ranks, strict=True):
        rows = [batch for batch, _ in parts]
        assert len({position for _, position in parts}) == 1
        batches.append(
            {
                "keys": [key for batch in rows for key in batch.keys],
                "captions": [caption for batch in rows for caption in batch.captions],
                "image_ids": torch.cat([batch.image_ids for batch in rows]),
                "image": torch.cat([batch.image for batch in rows]),
                "tokens": [
                    tokens[mask].tolist()
                    for batch in rows
                    for tokens, mask in zip(batch.tokens, batch.mask, strict=True)
                ],
                "after": parts[0][1],
            }
        )
    return batches


def _assert_same(got, wanted):
    assert len(got) == len(wanted)
    for batch, reference in zip(got, wanted, strict=True):
        for field in ("keys", "captions", "tokens", "after"):
            assert batch[field] == reference[field]
        for field in ("image", "image_ids"):
            assert torch.equal(batch[field], reference[field])


@pytest.fixture(scope="module")
def reference(synthetic):
    """Eight batches in one process: six of the first epoch, two of the second."""
    return _joint(synthetic, 1, 0, count=8)


def test_an_epoch_takes_every_image_once_and_the_next_another_order(reference):
    epoch = [key.split("#")[0] for batch in reference[:6] for key in batch["keys"]]
    assert len(set(epoch)) == len(epoch) == 96
    assert reference[5]["after"] == Position(1, 0)
    assert reference[6]["keys"] != reference[0]["keys"]


@pytest.mark.parametrize(("world", "workers"), CASES)
def test_global_batches_are_the_same_ordered_list(synthetic, reference, world, workers):
    _assert_same(_joint(synthetic, world, workers), reference[:BATCHES])


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (4, 2)])
def test_going_on_at_a_position_gives_the_rows_that_came_next(synthetic, reference, world, workers):
    """From the middle of an epoch over its end, in another world than the one that stopped."""
    start = reference[3]["after"]
    _assert_same(_joint(synthetic, world, workers, start, count=4), reference[4:8])


@pytest.mark.parametrize("captions", ["random", "first", "flat", 2])
@pytest.mark.parametrize("world", [1, 2])
def test_cached_features_come_in_the_order_of_the_decoded_rows(synthetic, captions, world):
    decoded = _joint(synthetic, 1, 0, captions=captions)
    _, shards, schedule = _parts(synthetic, 0, captions)
    reader, samples = SampleReader(shards), []
    for number, shard in enumerate(shards.shards):
        samples += [reader.read(number, sample) for sample in range(shard.samples)]
    counts = torch.tensor([len(sample.captions) for sample in samples])
    table = FeatureTable(
        image=torch.arange(len(samples))[:, None].float(),
        text=torch.arange(int(counts.sum()))[:, None].float(),
        first=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        good=torch.ones(len(samples), dtype=torch.bool),
        keys=[sample.key for sample in samples],
        captions=[caption for sample in samples for caption in sample.captions],
        damaged=[],
    )
    ranks = [
        list(
            islice(
                CachedStream(schedule, shards, table, World(rank, world)).batches(BEGINNING),
                BATCHES,
            )
        )
        for rank in range(world)
    ]
    for wanted, parts in zip(decoded, zip(*ranks, strict=True), strict=True):
        assert [key for batch, _ in parts for key in batch.keys] == wanted["keys"]
        assert [c for batch, _ in parts for c in batch.captions] == wanted["captions"]
        ids = torch.cat([batch.image_ids for batch, _ in parts])
        assert torch.equal(ids, wanted["image_ids"])
        # Each feature row belongs to the image and the caption that the row names.
        for batch, position in parts:
            assert position == wanted["after"]
            for image, text, key, caption in zip(
                batch.image, batch.tokens, batch.keys, batch.captions, strict=True
            ):
                assert table.keys[int(image)] == key.split("#")[0]
                assert table.captions[int(text)] == caption
