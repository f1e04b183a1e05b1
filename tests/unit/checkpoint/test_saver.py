"""What is on disk after a save, a kill in mid-save and a full disk; which checkpoints stay."""

import os

import pytest
import torch

from mmscale.checkpoint.files import Checkpoint, newest_sound, step_folder
from mmscale.checkpoint.resume import open_checkpoint, open_trained
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import Best, RunState
from mmscale.checkpoint.write import Kept, adopt_partial, take_snapshot, write_share
from mmscale.config.load import validate
from mmscale.config.schema import CheckpointConfig
from mmscale.contracts import NamedTensor, Position, World
from mmscale.errors import CheckpointError, HaltError

ALONE = World()
KEPT = Kept(validate({"data": {"train": "shards"}}).model_dump(mode="json"))


def _snapshot(step, world=ALONE, best=None, numel=1000):
    tensors = [NamedTensor(name, torch.full((numel,), float(step)), {}) for name in ("a", "b")]
    state = RunState(step, step, position=Position(0, step), lanes=1, best=best)
    return take_snapshot(state, {}, KEPT, tensors, {"cpu": torch.get_rng_state()}, world)


def _save(saver, *snapshots):
    for snapshot in snapshots:
        saver.save(snapshot)
    saver.finish()


def _steps(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir())


def _saver(run_dir, warn=print, **settings):
    return Saver(run_dir, ALONE, CheckpointConfig(**settings), warn)


def test_a_snapshot_holds_its_moment_whatever_becomes_of_the_tensors(tmp_path):
    living = torch.ones(100_000)
    tensors = [NamedTensor("a", living, {"exp_avg": living * 2})]
    saver = _saver(tmp_path)
    saver.save(take_snapshot(RunState(3), {}, KEPT, tensors, {}, ALONE))
    living.zero_()
    saver.finish()
    read = Checkpoint(step_folder(tmp_path, 3))
    assert read.read("value", "a").eq(1).all()
    assert read.moments("a")["exp_avg"].eq(2).all()


def test_what_a_stop_left_displaces_none_that_was_due(tmp_path):
    saver = _saver(tmp_path, keep=2)
    kept = {}
    for step in (4, 8, 9, 10, 12):
        saver.save(_snapshot(step), lambda step: step % 4 == 0)
        saver.settle()
        saver._thread.submit(lambda: None).result()
        kept[step] = _steps(tmp_path)
    saver.finish()
    assert kept == {4: [4], 8: [4, 8], 9: [4, 8, 9], 10: [4, 8, 10], 12: [8, 12]}


def test_the_newest_stay_and_the_best(tmp_path):
    best = Best("eval/i2t_r1", 50.0, 2)
    _save(_saver(tmp_path, keep=2), *(_snapshot(step, best=best) for step in range(1, 7)))
    assert _steps(tmp_path) == [2, 5, 6]
    assert open_checkpoint(tmp_path, ALONE).state.step == 6
    assert open_trained(tmp_path).state.step == 2
    assert open_trained(step_folder(tmp_path, 5)).state.step == 5


def test_checkpoints_of_a_course_that_was_left_go(tmp_path):
    """Also with one kept: the new one stays, not the damaged one that has a later step."""
    _save(_saver(tmp_path, keep=5), _snapshot(10), _snapshot(20))
    _save(_saver(tmp_path, keep=1), _snapshot(12))
    assert _steps(tmp_path) == [12]


def test_what_all_ranks_had_written_is_published_at_the_next_start(tmp_path):
    _save(_saver(tmp_path), _snapshot(1))
    for step, written in ((2, (0, 1)), (3, (0,)), (4, (1,))):
        aside = step_folder(tmp_path, step).with_suffix(".partial")
        aside.mkdir()
        for rank in written:
            write_share(_snapshot(step, World(rank, 2)), aside)
    assert newest_sound(tmp_path, ALONE).state.step == 1
    adopt_partial(tmp_path)
    assert _steps(tmp_path) == [1, 2]
    newest = newest_sound(tmp_path, ALONE)
    assert newest.state.step == 2
    assert newest.read("value", "b").eq(2).all()
    assert sorted(path.name for path in newest.folder.iterdir()) == [
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
        "state.json",
        "state.sha256",
    ]


@pytest.mark.parametrize("left", ["rank-00000-of-00001.json", "draft.json"])
def test_a_file_that_was_cut_short_is_not_published(tmp_path, left):
    """The note comes after its file is on disk: without it nothing is known of the file."""
    aside = step_folder(tmp_path, 2).with_suffix(".partial")
    aside.mkdir(parents=True)
    write_share(_snapshot(2), aside)
    (aside / left).unlink()
    adopt_partial(tmp_path)
    assert _steps(tmp_path) == []


def test_ranks_verify_a_share_of_the_files_each(tmp_path):
    aside = step_folder(tmp_path, 2).with_suffix(".partial")
    aside.mkdir(parents=True)
    for rank in (0, 1):
        write_share(_snapshot(2, World(rank, 2)), aside)
    adopt_partial(tmp_path)
    folder = step_folder(tmp_path, 2)
    with (folder / "rank-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    Checkpoint(folder, World(0, 2))
    with pytest.raises(CheckpointError, match="rank-00001-of-00002"):
        Checkpoint(folder, World(1, 2))
    with pytest.raises(CheckpointError, match="rank-00001-of-00002"):
        Checkpoint(folder)


def test_a_full_disk_leaves_the_checkpoint_before_and_is_borne_so_often(small_disk):
    told = []
    saver = _saver(small_disk, told.append, failures=2)
    saver.save(_snapshot(1))
    # Twice 800 kB do not fit beside the first.
    for step in (2, 3):
        saver.save(_snapshot(step, numel=200_000))
    saver.settle()
    assert [line.split()[0] for line in told] == ["step-00000002", "step-00000003"]
    assert all("No space left on device" in line for line in told)
    assert _steps(small_disk) == [1]
    assert newest_sound(small_disk, ALONE).read("value", "a").eq(1).all()
    saver.save(_snapshot(4))
    saver.settle()
    assert _steps(small_disk) == [1, 4], "what failed has made room"
    for step in (5, 6):
        saver.save(_snapshot(step, numel=200_000))
    saver.settle()
    saver.save(_snapshot(7, numel=200_000))
    with pytest.raises(CheckpointError, match=r"step-00000007.*3 in a row"):
        saver.settle()
    assert newest_sound(small_disk, ALONE).state.step == 4


def test_a_run_does_not_end_well_without_its_last_checkpoint(small_disk):
    saver = _saver(small_disk, lambda line: None, failures=9)
    saver.save(_snapshot(1, numel=200_000))
    with pytest.raises(CheckpointError, match="No space left"):
        saver.finish()


def test_the_best_is_remembered_in_the_state(tmp_path):
    best = Best("eval/i2t_r1", 50.0, 1)
    _save(_saver(tmp_path), _snapshot(2, best=best), _snapshot(3))
    assert Checkpoint(step_folder(tmp_path, 2)).state.best == best
    assert Checkpoint(step_folder(tmp_path, 3)).state.best is None


def test_files_beside_the_tensors_are_kept_under_digests(tmp_path):
    attached = {"text/tokenizer.json": b"{}", "vision.json": bytes(range(256))}
    kept = Kept(KEPT.config, {"data.train": "0" * 64}, attached)
    saver = _saver(tmp_path)
    saver.save(take_snapshot(RunState(3), {}, kept, [], {}, ALONE))
    saver.finish()
    read = Checkpoint(step_folder(tmp_path, 3))
    assert {name: read.attached(name) for name in read.files} == attached
    assert read.contents == kept.contents
    (read.folder / "text" / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(CheckpointError, match="not what was written"):
        Checkpoint(read.folder)


def test_weights_that_are_not_finite_are_never_published(tmp_path):
    sound = NamedTensor("a", torch.ones(9), {"exp_avg": torch.ones(9)})
    constant = NamedTensor("mask", torch.full((3,), -torch.inf), {})
    bad = torch.tensor([1.0, torch.inf])
    for number, tensor in enumerate(
        (
            NamedTensor("b", torch.tensor([1.0, torch.nan]), {}),
            NamedTensor("b", bad, {}, trained=True),
            NamedTensor("b", bad, {"exp_avg": torch.zeros(2)}, trained=True),
            NamedTensor("b", torch.zeros(2), {"exp_avg": bad}, trained=True),
        )
    ):
        saver = _saver(tmp_path / str(number), failures=9)
        saver.save(take_snapshot(RunState(1), {}, KEPT, [sound, constant], {}, ALONE))
        saver.save(take_snapshot(RunState(2), {}, KEPT, [sound, tensor], {}, ALONE))
        with pytest.raises(HaltError, match="not written, since rank 0: b is not finite"):
            saver.settle()
        assert _steps(tmp_path / str(number)) == [1], "nothing is left of it"
