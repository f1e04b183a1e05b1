"""Design principle 2: rows follow from the position, at every world and worker count."""

from itertools import islice

import pytest
import torch

from mmscale.contracts import InputSpec, Position, World
from mmscale.data.features import CachedStream, FeatureTable
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.data.stream import TrainStream
from mmscale.engine.plan import plan_batch
from tests.unit.data.web_server import serving

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


def _parts(synthetic, workers, *words):
    """Configuration, shards and the order, as a run puts them together."""
    config = synthetic.config(
        f"data.workers={workers}",
        f"train.global_batch_size={BATCH}",
        "data.shuffle_buffer=40",
        *words,
    )
    shards = open_train(config.data)
    lanes = plan_batch(config, 4).lanes
    return config, shards, plan_schedule(config, shards, lanes)


def _joint(synthetic, world, workers, *words, start=BEGINNING, count=BATCHES):
    """Some global batches: the rows of all ranks laid end to end, and the position after each."""
    config, shards, schedule = _parts(synthetic, workers, *words)
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
    _assert_same(_joint(synthetic, world, workers, start=start, count=4), reference[4:8])


def _weighted(synthetic):
    """Of 64 images, 32 and 16 more; of the other 32, 8: an epoch of seven and a half batches."""
    first = f"{synthetic.train}/train-{{000000..000001}}.tar"
    last = f"{synthetic.train}/train-000002.tar"
    sources = f"[{{shards: '{first}', weight: 1.75}}, {{shards: ['{last}'], weight: 0.25}}]"
    return [f"data.train={sources}"]


def _resampled(synthetic):
    return [f"data.train={synthetic.train}", "data.resampled=true", "data.epoch_samples=70"]


MODES = {"weighted": (_weighted, 7), "resampled": (_resampled, 4)}


@pytest.fixture(scope="module", params=MODES)
def mode(synthetic, request):
    """Settings, batches of an epoch, and an epoch and two batches more in one process."""
    make, steps = MODES[request.param]
    words = make(synthetic)
    return words, steps, _joint(synthetic, 1, 0, *words, count=steps + 2)


@pytest.mark.parametrize(("world", "workers"), CASES)
def test_weighted_and_resampled_batches_are_the_same_ordered_list(synthetic, mode, world, workers):
    words, _, reference = mode
    _assert_same(_joint(synthetic, world, workers, *words), reference[:BATCHES])


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 2)])
def test_weighted_and_resampled_go_on_at_a_position(synthetic, mode, world, workers):
    words, steps, reference = mode
    assert reference[steps - 1]["after"] == Position(1, 0)
    start = reference[steps - 3]["after"]
    got = _joint(synthetic, world, workers, *words, start=start, count=4)
    _assert_same(got, reference[steps - 2 :])


def test_an_image_that_comes_again_brings_another_caption_and_crop(synthetic):
    words = [f"data.train=[{{shards: '{synthetic.train}', weight: 2}}]", "data.augment=crop"]
    for captions in ("random", "first"):
        rows = {}
        for batch in _joint(synthetic, 1, 0, *words, f"data.captions={captions}", count=12):
            for key, pixels in zip(batch["keys"], batch["image"], strict=True):
                image, caption = key.split("#")
                rows.setdefault(image, []).append((caption, pixels))
        assert len(rows) == 96
        for (first, pixels), (second, others) in rows.values():
            assert (first != second) == (captions == "random")
            assert not torch.equal(pixels, others)


@pytest.mark.parametrize(("world", "workers", "ranges"), [(1, 2, True), (2, 0, False)])
def test_shards_behind_a_server_give_the_same_rows(
    synthetic, reference, monkeypatch, world, workers, ranges
):
    monkeypatch.setattr("mmscale.data.remote.FIRST_PAUSE", 0.005)
    with serving(synthetic.train) as server:
        server.ranges, server.drops = ranges, 2
        got = _joint(synthetic, world, workers, f"data.train={server.url}")
        assert server.drops == 0
    _assert_same(got, reference[:BATCHES])


@pytest.mark.parametrize("captions", ["random", "first", "flat", 2])
@pytest.mark.parametrize("world", [1, 2])
def test_cached_features_come_in_the_order_of_the_decoded_rows(synthetic, captions, world):
    decoded = _joint(synthetic, 1, 0, f"data.captions={captions}")
    _, shards, schedule = _parts(synthetic, 0, f"data.captions={captions}")
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
        cut=torch.zeros(int(counts.sum()), dtype=torch.bool),
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
