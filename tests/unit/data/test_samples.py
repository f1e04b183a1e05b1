"""Decoding processes of evaluation and of the feature pass: what ends one is told in a sentence."""

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from mmscale.data.features import SampleBatches
from mmscale.data.shards import open_shards
from mmscale.errors import DataError, LaunchError, told
from mmscale.parallel.signals import heeding_signals
from tests.ranks.test_stream_worlds import SPEC


def _struck(pid, number):
    """Torch raises when the signal of the child's end arrives, wherever that is."""
    os.kill(pid, number)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGALRM])
def test_a_process_that_was_killed_is_told(synthetic, number):
    shards = open_shards("data.eval", str(synthetic.train))
    left = []

    def command() -> int:
        left.append(SampleBatches(shards, SPEC, range(96), 4).loader(1))
        next(left[0])
        return 0

    # Torch's listener, put up once in a process, hears of this one's end and of later ones'.
    assert heeding_signals(command) == 0
    assert multiprocessing.active_children() == []
    batches = SampleBatches(shards, SPEC, range(96), 4).loader(1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(RuntimeError) as raised:
        _struck(worker.pid, number)
    failure = told(raised.value)
    assert isinstance(failure, LaunchError)
    assert f"a decoding process (pid {worker.pid}) was ended from outside" in str(failure)
    assert ("memory" in str(failure)) == (number != signal.SIGALRM)
    assert "last checkpoint" in str(failure)


def _lengths(captions):
    return [[len(caption)] for caption in captions]


def test_a_process_that_is_not_forked_decodes_the_same(synthetic):
    # macOS starts them so, and Python from 3.14 on everywhere.
    shards, spec = open_shards("data.eval", str(synthetic.train)), replace(SPEC, tokenize=_lengths)
    batches = SampleBatches(shards, spec, range(8), 8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (there,) = pool.map(batches.__getitem__, [0])
    assert there.keys == batches[0].keys
    assert torch.equal(there.pixels, batches[0].pixels)


def test_other_errors_stay_bugs():
    assert told(RuntimeError("DataLoader worker is fine")) is None
    assert told(ValueError("DataLoader worker (pid 3) is killed by signal: Killed. ")) is None
    shared = RuntimeError(
        "DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory."
    )
    assert "/dev/shm" in str(told(shared))
    assert "(pid 4, 5)" in str(
        told(RuntimeError("DataLoader worker (pid(s) 4, 5) exited unexpectedly"))
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_is_a_sentence_and_no_traceback(synthetic, tmp_path, workers):
    folder = shutil.copytree(synthetic.val, tmp_path / "val")
    shards = open_shards("data.eval", str(folder))
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError) as raised:
        list(SampleBatches(shards, SPEC, range(24), 4).loader(workers))
    assert str(raised.value).count("\n") == 0
    assert "cannot be read" in str(raised.value)
