"""How many processes decode for a rank."""

import multiprocessing
import os

import pytest
import torch

from mmscale.config.load import load_config
from mmscale.contracts import Position, World
from mmscale.data.lanes import sections
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards
from mmscale.data.stream import TrainStream
from mmscale.data.workers import worker_count
from mmscale.engine.plan import plan_batch
from mmscale.errors import ConfigError
from mmscale.parallel.world import rank_cores
from tests.unit.data.test_built_streams import SPEC

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("workers", "device", "cores", "count"),
    [
        ("auto", CUDA, 8, 6),
        ("auto", CUDA, 3, 2),
        ("auto", CUDA, 1, 2),
        ("auto", CUDA, 96, 12),
        ("auto", CPU, 96, 2),
        (0, CUDA, 8, 0),
        (20, CPU, 2, 20),
    ],
)
def test_auto_leaves_two_cores_to_a_rank_that_computes_elsewhere(workers, device, cores, count):
    assert worker_count(workers, device, cores) == count


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("world", "environ", "cores"),
    [
        (World(), {}, 16),
        (World(0, 8, launcher="torchrun"), {"LOCAL_WORLD_SIZE": "4"}, 4),
        (World(0, 8, launcher="deepspeed"), {"LOCAL_SIZE": "2"}, 8),
        (World(0, 32, launcher="torchrun"), {}, 1),
        # A task's cores are its own and are not divided again.
        (World(0, 8, launcher="slurm"), {"SLURM_CPUS_PER_TASK": "12"}, 12),
        # torchrun within a job of one task.
        (
            World(0, 8, launcher="torchrun"),
            {"SLURM_CPUS_PER_TASK": "96", "LOCAL_WORLD_SIZE": "8"},
            2,
        ),
    ],
)
def test_a_rank_has_its_share_of_the_cores(sixteen_cores, world, environ, cores):
    assert rank_cores(world, environ) == cores


def test_the_setting_stays_auto_and_takes_nothing_else_that_is_no_number():
    assert load_config(["demo", "data.train=a", "data.workers=auto"]).data.workers == "auto"
    with pytest.raises(ConfigError, match=r"data\.workers"):
        load_config(["demo", "data.train=a", "data.workers=many"])
    with pytest.raises(ConfigError, match=r"data\.workers"):
        load_config(["demo", "data.train=a", "data.workers=-1"])


def test_more_workers_than_lanes_share_every_lane_once():
    parts = sections(3, 12)
    assert [lane for part in parts for lane in range(part.start, part.stop)] == [0, 1, 2]


def test_a_stream_starts_what_auto_comes_to_and_its_rows_stay_the_same(synthetic, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    shards = open_shards("data.train", str(synthetic.train))
    rows = {}
    for workers, device, processes in (("0", CPU, 0), ("auto", CUDA, 3), ("auto", CPU, 2)):
        config = synthetic.config("train.global_batch_size=16", f"data.workers={workers}")
        schedule = plan_schedule(config, shards, plan_batch(config, 1).lanes)
        batches = TrainStream(config, shards, schedule, SPEC, World(), device).batches(Position())
        before = len(multiprocessing.active_children())
        batch, _ = next(batches)
        assert len(multiprocessing.active_children()) - before == processes
        rows[workers, device.type] = (batch.keys, batch.captions, batch.image)
        batches.close()
    keys, captions, images = rows["0", "cpu"]
    for other in rows.values():
        assert (other[0], other[1]) == (keys, captions)
        assert torch.equal(other[2], images)
