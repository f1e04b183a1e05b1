"""Room for checkpoints: asked for before the first step, made where it is missing later."""

import pytest
import torch
from torch import nn

from mmscale.checkpoint.files import newest_sound, step_folders
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import Best, RunState
from mmscale.checkpoint.write import Kept, take_snapshot
from mmscale.config.evaluation import RetainConfig
from mmscale.config.load import validate
from mmscale.config.schema import CheckpointConfig, Config
from mmscale.config.values import Duration
from mmscale.contracts import NamedTensor, World
from mmscale.errors import ConfigError
from mmscale.preflight import checkpoints_ahead, require_room

ALONE = World()
# 250 kB of tensors, so that three lie on the disk of 1 MB and no fourth.
NUMEL = 62_500


def _config(folder, **checkpoint) -> Config:
    return validate(
        {
            "run": {"dir": str(folder)},
            "data": {"train": "shards", "eval": "shards"},
            "checkpoint": checkpoint,
        }
    )


def _snapshot(step, best=None, numel=NUMEL):
    config = _config("run").model_dump(mode="json")
    tensors = [NamedTensor("a", torch.full((numel,), float(step)), {})]
    state = RunState(step, best=None if best is None else Best("eval/mean", 1.0, best))
    return take_snapshot(state, {}, Kept(config), tensors, {}, ALONE)


def _saver(folder, told, keep):
    return Saver(folder, ALONE, CheckpointConfig(keep=keep, failures=9), told.append)


def _steps(folder):
    return [int(path.name[5:]) for path in reversed(step_folders(folder))]


def test_the_oldest_go_where_the_next_has_no_room(small_disk):
    told = []
    saver = _saver(small_disk, told, keep=9)
    for step in range(1, 7):
        saver.save(_snapshot(step, best=2))
    saver.finish()
    assert _steps(small_disk) == [2, 5, 6], "the best stays, and the newest"
    assert [line.split()[0] for line in told] == [f"step-0000000{step}" for step in (4, 5, 6)]
    assert "step-00000001 made some" in told[0]
    assert newest_sound(small_disk, ALONE).read("value", "a").eq(6).all()


def test_nothing_goes_for_one_that_has_no_room_at_all(small_disk):
    told = []
    saver = _saver(small_disk, told, keep=9)
    for step in (1, 2, 3):
        saver.save(_snapshot(step))
    saver.save(_snapshot(4, numel=10 * NUMEL))
    saver.settle()
    assert _steps(small_disk) == [1, 2, 3]
    assert "step-00000004 could not be written" in told[0]
    assert "No space left on device" in told[0]


def test_the_newest_stays_where_it_is_all_there_is(small_disk):
    told = []
    saver = _saver(small_disk, told, keep=1)
    saver.save(_snapshot(1, numel=2 * NUMEL))
    saver.save(_snapshot(2, numel=3 * NUMEL))
    saver.settle()
    assert _steps(small_disk) == [1]
    assert "step-00000002 could not be written" in told[0]


def test_a_run_asks_for_the_room_of_all_that_it_keeps_and_one(small_disk):
    model = nn.Linear(150, 150)  # 90.6 kB, and two moments: 272 kB
    require_room(_config(small_disk, keep=2), model, 99, False, ALONE)
    for more in ({"keep": 3}, {"keep": 2, "best": "eval/mean"}):
        with pytest.raises(ConfigError, match=r"4 checkpoints of this run need 1\.1 MB"):
            require_room(_config(small_disk, **more), model, 99, False, ALONE)
        require_room(_config(small_disk, **more), model, 3, False, ALONE)
    with pytest.raises(ConfigError, match=r"3 checkpoints of this run need 1\.1 MB"):
        require_room(_config(small_disk, keep=2), model, 99, True, ALONE)


def test_what_is_there_needs_no_room(small_disk):
    saver = _saver(small_disk, [], keep=3)
    for step in (1, 2, 3):
        saver.save(_snapshot(step))
    saver.finish()
    with pytest.raises(ConfigError, match="1 checkpoint of this run need"):
        require_room(_config(small_disk, keep=3), nn.Linear(150, 150), 99, False, ALONE)
    require_room(_config(small_disk, keep=3), nn.Linear(100, 100), 99, False, ALONE)


@pytest.mark.parametrize(
    ("checkpoint", "steps", "wanted"),
    [
        ({"every": "10 steps"}, 20, 2),
        ({"every": "10 steps"}, 21, 3),
        ({"every": "10 steps"}, 0, 1),
        ({"every": None}, 500, 1),
        ({"every": None, "best": "eval/mean"}, 50, 5),
        ({"every": "10 steps", "best": "eval/mean"}, 50, 10),
    ],
)
def test_checkpoints_of_a_run_are_counted(checkpoint, steps, wanted):
    config = _config("run", **checkpoint)

    def steps_of(duration: Duration) -> int:
        return duration.steps(10, 16)

    assert checkpoints_ahead(config, steps, steps_of) == wanted
    retaining = config.model_copy(update={"retain": RetainConfig(sets=("a",))})
    assert checkpoints_ahead(retaining, steps, steps_of) == wanted + 1
