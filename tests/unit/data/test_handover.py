"""Rows that cross from worker to training process arrive whole, however slow the reader is."""

import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mmscale.contracts import InputSpec, Position, World
from mmscale.data import stream
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.data.stream import TrainStream

BATCH, BATCHES = 8, 14
SPEC = InputSpec(
    24, (0.5,) * 3, (0.5,) * 3, "bicubic", lambda texts: [[len(t)] for t in texts], 0, 9
)


def batches_of(synthetic, workers, lanes, pause=0.0):
    config = synthetic.config(
        f"data.workers={workers}",
        f"data.lanes={lanes}",
        f"train.global_batch_size={BATCH}",
        "data.captions=2",
    )
    shards = open_train(config.data)
    schedule = plan_schedule(config, shards, lanes)
    stream = TrainStream(config, shards, schedule, SPEC, World()).batches(Position())
    found = []
    for batch, _ in islice(stream, BATCHES):
        # The workers get as far ahead as they may.
        time.sleep(pause)
        found.append(batch)
    return found


@pytest.mark.parametrize(("workers", "lanes"), [(1, 4), (2, 4), (3, 4), (3, 2), (2, 1)])
def test_batches_that_were_kept_are_never_written_again(synthetic, workers, lanes):
    wanted = batches_of(synthetic, 0, lanes)
    got = batches_of(synthetic, workers, lanes, pause=0.03)
    assert len({batch.image.numpy().tobytes() for batch in got}) == BATCHES
    for batch, reference in zip(got, wanted, strict=True):
        assert batch.keys == reference.keys
        assert batch.image.dtype == torch.uint8
        assert torch.equal(batch.image, reference.image)


def test_pixels_of_another_sample_are_noticed(synthetic, monkeypatch):
    """With one slot a worker writes its next share over rows that are still to be read."""
    monkeypatch.setattr(stream, "_SLOTS", 1)
    with pytest.raises(AssertionError, match="another sample's pixels"):
        batches_of(synthetic, 2, 4, pause=0.05)


def test_tokens_of_another_caption_are_noticed(synthetic, monkeypatch):
    def in_another_order(texts):
        return [[len(text)] for text in sorted(texts)]

    monkeypatch.setattr(f"{__name__}.SPEC", replace(SPEC, tokenize=in_another_order))
    with pytest.raises(AssertionError, match="tokens that its caption alone does not give"):
        batches_of(synthetic, 0, 4)
