"""Match modes, labels and built batches through the real streams, decoding and cached alike."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from mmscale.contracts import InputSpec, Position, World
from mmscale.data.arrange import Neighbours, nearest
from mmscale.data.caption_text import are_cut, with_cleaning
from mmscale.data.features import CachedStream, FeatureTable
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards, open_train
from mmscale.data.stream import TrainStream
from mmscale.engine.plan import plan_batch
from mmscale.errors import ConfigError, DataError

SPEC = InputSpec(
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    interpolation="bicubic",
    tokenize=lambda captions: [[1, *map(len, caption.split()[:14]), 2] for caption in captions],
    pad_token=0,
    context_length=16,
)
BATCHES = 4
FIELDS = ("keys", "captions", "image_ids", "match_ids", "labels", "cut")
CASES = {
    "k captions": ["data.captions=2"],
    "caption groups": ["data.match=caption", "data.positive_share=0"],
    "positives": ["data.match=caption", "data.positive_share=0.5", "data.captions=2"],
    "hard": ["data.hard_batches.table=given", "data.hard_batches.window=3"],
    "flat and hard": ["data.captions=flat", "data.hard_batches.table=given"],
}


@pytest.fixture(scope="module")
def shards(synthetic):
    return open_shards("data.train", str(synthetic.train))


@pytest.fixture(scope="module")
def table(shards):
    """A feature of each image and caption that names it."""
    reader = SampleReader(shards)
    samples = [
        reader.read(number, sample)
        for number, shard in enumerate(shards.shards)
        for sample in range(shard.samples)
    ]
    texts = [caption for sample in samples for caption in sample.captions]
    counts = torch.tensor([len(sample.captions) for sample in samples])
    return FeatureTable(
        image=torch.randn(len(samples), 6, generator=torch.Generator().manual_seed(1)),
        text=torch.randn(len(texts), 6, generator=torch.Generator().manual_seed(2)),
        first=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        good=torch.ones(len(samples), dtype=torch.bool),
        cut=torch.tensor(are_cut(SPEC, texts, SPEC.tokenize(texts))),
        keys=[sample.key for sample in samples],
        captions=texts,
        damaged=[],
    )


def schedule_of(synthetic, shards, table, words, workers=0):
    config = synthetic.config(
        "train.global_batch_size=16",
        "data.shuffle_buffer=40",
        f"data.workers={workers}",
        *words,
    )
    given = table.neighbours() if config.data.hard_batches.table else None
    return config, plan_schedule(config, shards, plan_batch(config, 4).lanes, given)


def joint(streams, start=Position()):  # noqa: B008 - a frozen record
    """The ranks' rows laid end to end, batch by batch."""
    ranks = [list(islice(stream.batches(start), BATCHES)) for stream in streams]
    joined = []
    for parts in zip(*ranks, strict=True):
        batches = [batch for batch, _ in parts]
        assert len({position for _, position in parts}) == 1
        rows = {
            "keys": [key for batch in batches for key in batch.keys],
            "captions": [text for batch in batches for text in batch.captions],
            "cut": sum(batch.cut for batch in batches),
        }
        for field in ("image_ids", "match_ids", "labels"):
            rows[field] = torch.cat([getattr(batch, field) for batch in batches]).tolist()
        joined.append((rows, parts[0][1]))
    return joined


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_cached_features_come_as_the_decoded_rows_do(synthetic, shards, table, words):
    config, schedule = schedule_of(synthetic, shards, table, words)
    decoded = joint([TrainStream(config, shards, schedule, SPEC, World())])
    for world in (1, 2):
        ranks = [CachedStream(schedule, shards, table, World(rank, world)) for rank in range(world)]
        assert joint(ranks) == decoded
    labels = {label for rows, _ in decoded for label in rows["labels"]}
    assert labels <= set(range(8))
    assert len(labels) > 3


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (4, 2)])
def test_built_batches_come_from_real_loaders_in_one_order(
    synthetic, shards, table, world, workers
):
    words = ["data.hard_batches.table=given", "data.hard_batches.window=2", "data.positive_share=0"]
    _, schedule = schedule_of(synthetic, shards, table, words)
    whole = joint([CachedStream(schedule, shards, table, World())])
    config, schedule = schedule_of(synthetic, shards, table, words, workers)
    streams = [
        TrainStream(config, shards, schedule, SPEC, World(rank, world)) for rank in range(world)
    ]
    assert joint(streams) == whole
    # Going on in the middle of a window.
    after = whole[0][1]
    assert joint(streams, after)[: BATCHES - 1] == whole[1:]


def test_an_epoch_of_built_batches_holds_every_image_once(synthetic, shards, table):
    words = ["data.hard_batches.table=given", "data.hard_batches.share=1"]
    _, schedule = schedule_of(synthetic, shards, table, words)
    stream = CachedStream(schedule, shards, table, World())
    keys = [key for batch, _ in islice(stream.batches(Position()), 6) for key in batch.keys]
    assert len({key.split("#")[0] for key in keys}) == len(keys) == 96


def test_k_captions_are_k_positives(synthetic, shards, table):
    config, schedule = schedule_of(synthetic, shards, table, ["data.captions=4"])
    batch, _ = next(TrainStream(config, shards, schedule, SPEC, World()).batches(Position()))
    matches = batch.match_ids.reshape(4, 4)
    assert (matches == matches[:, :1]).all()
    assert len(set(matches[:, 0].tolist())) == 4
    assert len(set(batch.keys)) == 16


def test_groups_that_cannot_be_kept_apart_are_refused(synthetic, shards, table):
    words = ["data.captions=flat", "data.positive_share=0", "train.global_batch_size=240"]
    with pytest.raises(ConfigError, match=r"data\.positive_share=0.* 5 images .* 2 batches"):
        schedule_of(synthetic, shards, table, words)


def test_a_table_of_other_images_is_refused(synthetic, shards):
    config = synthetic.config("train.global_batch_size=16", "data.hard_batches.table=given")
    other = nearest(torch.randn(9, 3), torch.arange(9) + 2**62)
    with pytest.raises(DataError, match="names no two images"):
        plan_schedule(config, shards, 4, other)
    alone = Neighbours(np.arange(3), np.zeros((3, 1), np.int32))
    with pytest.raises(DataError, match="names no two images"):
        plan_schedule(config, shards, 4, alone)


CLASSIFY = "loss.terms=[{kind: classification}]"


def test_labels_that_a_term_needs_must_be_there(synthetic, shards, table):
    words = ["model.fusion.classes=8", CLASSIFY]
    schedule_of(synthetic, shards, table, words)
    with pytest.raises(ConfigError, match=r"model\.fusion\.classes=7.* label 7; set it to 8"):
        schedule_of(synthetic, shards, table, ["model.fusion.classes=7", CLASSIFY])
    bare = tuple(replace(shard, identities=None) for shard in shards.shards)
    with pytest.raises(DataError, match=r"no image of .* has a label.* mmscale index"):
        schedule_of(synthetic, replace(shards, shards=bare), table, words)


def test_shards_without_a_manifest_tell_their_labels_themselves(synthetic, shards):
    tars = str(synthetic.train / "*.tar")
    config = synthetic.config(
        "train.global_batch_size=16", "data.resampled=true", "data.workers=0", f"data.train={tars}"
    )
    drawn = open_train(config.data)
    schedule = plan_schedule(config, drawn, 4)
    batch, _ = next(TrainStream(config, drawn, schedule, SPEC, World()).batches(Position()))
    known = {
        image: label
        for shard in shards.shards
        for image, label in zip(shard.identities.images, shard.identities.labels, strict=True)
    }
    assert [known[i] for i in batch.image_ids.tolist()] == batch.labels.tolist()


@pytest.mark.parametrize(
    "word",
    ["data.match=caption", "data.positive_share=0", "data.hard_batches.table=t.npz"],
)
def test_what_needs_a_manifest_contradicts_resampling(synthetic, word):
    with pytest.raises(ConfigError, match=r"data\.resampled"):
        synthetic.config("data.resampled=true", word)


def test_cut_captions_are_counted(synthetic, shards, table):
    """A caption of 14 words just fits between start and end."""
    long = [len(caption.split()) > 14 for caption in table.captions]
    assert table.cut.tolist() == long
    assert 0 < sum(long) < len(long)
    config, schedule = schedule_of(synthetic, shards, table, [])
    batch, _ = next(TrainStream(config, shards, schedule, SPEC, World()).batches(Position()))
    assert batch.cut == sum(len(caption.split()) > 14 for caption in batch.captions) > 0


def test_captions_are_cleaned_as_openclip_cleans_them():
    def spelled(cleaning):
        spec = replace(SPEC, tokenize=lambda captions: [[*map(ord, text)] for text in captions])
        (codes,) = with_cleaning(spec, cleaning).tokenize(["  A &amp;amp; B's  cafÃ©\n"])
        return "".join(map(chr, codes))

    assert spelled("none") == "  A &amp;amp; B's  cafÃ©\n"
    assert spelled("whitespace") == "A & B's café"
    assert spelled("lower") == "a & b's café"
    assert spelled("canonicalize") == "a bs café"
