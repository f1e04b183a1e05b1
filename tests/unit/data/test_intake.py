"""Tables that a run names: packed once, in its own folder a content, by one process at a time."""

import csv
import fcntl
import io
import multiprocessing
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

from mmscale.config.data import ColumnsConfig, DataConfig
from mmscale.config.load import load_config
from mmscale.data import intake
from mmscale.data.intake import Intake, is_source
from mmscale.data.pack import PackSettings, pack
from mmscale.data.shards import open_shards, open_train
from mmscale.errors import ConfigError, DataError

FORK = multiprocessing.get_context("fork")


def photos(folder, count=12, name="photos.csv", split=None):
    """A table of so many pictures beside it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        (folder / "images" / f"p{number:05d}.png").write_bytes(file.getvalue())
        own = [] if split is None else [split(number)]
        rows.append([f"p{number:05d}.png", f"No {number}", *own])
    with (folder / name).open("w", newline="") as file:
        header = ["image", "caption", *([] if split is None else ["split"])]
        csv.writer(file).writerows([header, *rows])
    return str(folder / name)


@pytest.fixture
def told():
    return []


def places(shards):
    return [str(path) for path in shards.paths]


def opened(where, told, setting="data.train", **options):
    return open_shards(setting, where, intake=Intake(tell=told.append, **options))


def test_a_table_is_packed_once_and_is_what_pack_makes_of_it(tmp_path, told):
    where = photos(tmp_path / "mine")
    shards = opened(where, told)
    pack(tmp_path / "mine" / "photos.csv", tmp_path / "packed", PackSettings())
    assert shards.digest == open_shards("data.train", str(tmp_path / "packed" / "train")).digest
    assert any("is packed once, its split train into" in line for line in told)
    told.clear()
    assert places(opened(where, told)) == places(shards)
    (line,) = told
    assert line.startswith(
        f"data.train={where}: packed before, at {tmp_path / 'mine' / '.mmscale'}"
    )


def test_a_changed_source_is_packed_beside_what_was_packed(tmp_path, told):
    where = photos(tmp_path)
    first = opened(where, told)
    kept = first.paths[0].read_bytes()
    with (tmp_path / "photos.csv").open("a") as file:
        file.write("p00000.png,Another caption\n")
    told.clear()
    second = opened(where, told)
    assert first.digest != second.digest
    assert sum("is not what was packed at" in line for line in told) == 1
    os.utime(tmp_path / "images" / "p00003.png", ns=(1, 1))
    third = opened(where, told)
    assert third.digest == second.digest
    assert places(third) != places(second)
    assert first.paths[0].read_bytes() == kept


def test_train_and_held_out_pairs_of_one_table(tmp_path, told):
    where = photos(tmp_path, split=lambda number: "validation" if number % 3 == 0 else "train")
    assert opened(where, told).samples == 8
    assert opened(where, told, "data.eval").samples == 4
    assert opened(where, told, "--data").samples == 4
    only = photos(tmp_path / "other", split=lambda number: "val")
    with pytest.raises(DataError, match=r"has no split train, it has val; name another source"):
        opened(only, told)


def test_a_share_is_held_out_of_a_table_without_splits(tmp_path, told):
    where = photos(tmp_path, 20)
    train = opened(where, told, hold_out=0.2)
    held_out = opened(where, told, "data.eval", hold_out=0.2)
    assert (train.samples, held_out.samples) == (16, 4)
    assert opened(where, told, "--data").samples == 20
    assert not any("is not what was packed" in line for line in told)


def test_the_same_table_is_evaluated_on_where_a_share_is_held_out(tmp_path):
    words = ["flickr8k", f"data.train={photos(tmp_path)}", "data.eval=null", "data.hold_out=0.1"]
    config = load_config(words)
    assert config.data.eval == config.data.train
    with pytest.raises(ConfigError, match="name the same table there or leave"):
        load_config([*words, "data.eval=other.csv"])


def test_columns_and_cache_are_settings(tmp_path):
    where = photos(tmp_path / "mine")
    data = DataConfig(train=where, cache=str(tmp_path / "kept"), columns={"captions": "image"})
    shards = open_train(data)
    assert shards.paths[0].is_relative_to(tmp_path / "kept")
    assert not (tmp_path / "mine" / ".mmscale").exists()
    with pytest.raises(DataError, match="no column what, which was asked for as captions"):
        open_train(data.model_copy(update={"columns": ColumnsConfig(captions="what")}))


def test_the_users_cache_where_the_folder_cannot_be_written(tmp_path, told, monkeypatch):
    where = photos(tmp_path / "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    refused = str(tmp_path / "mine")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != refused and real(path, mode))
    (path,) = opened(where, told).paths
    assert path.is_relative_to(tmp_path / "own" / "mmscale")


def test_shards_images_and_pairs_are_told_apart_by_what_is_there(tmp_path, told):
    photos(tmp_path)
    pack(tmp_path, tmp_path / "packed", PackSettings())
    assert is_source(str(tmp_path))
    assert not is_source(str(tmp_path / "packed" / "train"))
    assert not is_source(str(tmp_path / "packed"))
    assert not is_source(str(tmp_path / "images"))
    assert not is_source("hf://datasets/org/name/{0..3}.tar")
    assert is_source("hf:org/name")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        opened(str(tmp_path / "images"), told)


def _open(where, file):
    told = file.open("a", buffering=1)
    open_shards("data.train", where, intake=Intake(tell=lambda line: told.write(f"{line}\n")))


def test_two_that_start_at_once_pack_once(tmp_path):
    where = photos(tmp_path, 60)
    files = [tmp_path / f"told-{number}" for number in range(2)]
    processes = [FORK.Process(target=_open, args=(where, file)) for file in files]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    text = "".join(file.read_text() for file in files)
    assert text.count("is packed once") == 1


def test_who_comes_second_waits_and_says_so(tmp_path, monkeypatch):
    where, file = photos(tmp_path), tmp_path / "told"
    _open(where, file)
    (manifest,) = tmp_path.glob(".mmscale/*/train/manifest.json")
    content = manifest.read_bytes()
    manifest.unlink()
    with (manifest.parents[1] / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = FORK.Process(target=_open, args=(where, file))
        process.start()
        _until(lambda: "another process is packing it" in file.read_text())
        time.sleep(3 * intake._POLL_SECONDS)
        assert process.is_alive()
        manifest.write_bytes(content)
        # The process has this open file too.
        fcntl.flock(lock, fcntl.LOCK_UN)
    process.join(30)
    assert process.exitcode == 0
    assert file.read_text().count("is packed once") == 1


def test_ctrl_c_in_the_middle_and_again(tmp_path, told, monkeypatch):
    monkeypatch.setattr(
        "mmscale.data.pack.PackSettings", partial(PackSettings, samples_per_shard=20)
    )
    where = photos(tmp_path, 400)
    process = FORK.Process(target=_open, args=(where, tmp_path / "told"))
    process.start()
    _until(lambda: [*tmp_path.glob(".mmscale/*/train/*.tar")])
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1
    assert not [*tmp_path.glob(".mmscale/*/train/manifest.json")]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".mmscale/*/train/*.tar")}
    shards = opened(where, told)
    after = {path: path.stat().st_mtime_ns for path in shards.paths}
    assert (shards.samples, len(after)) == (400, 20)
    assert 0 < len(before) < 20
    assert before.items() <= after.items()


def _until(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
