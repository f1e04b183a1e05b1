"""What is refused before a step: ranks not started alike, a folder in use, a disk too small."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmscale.data.pack import PackSettings, pack
from mmscale.data.synth import SynthSettings, render
from tests.ranks.launch import free_port
from tests.whole.command import ROOT, TRAIN, end, explain, run, start
from tests.whole.small_run import (
    ALONE,
    interrupt_after,
    succeed,
    training_lines,
    words_for,
    write_settings,
)


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    """The configuration's words."""
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


def _two_ranks(commands, folders=(ROOT, ROOT), paths=(ROOT, ROOT)) -> list[tuple[int, str]]:
    """Exit code and stderr of two ranks, each with its own command, working folder and code."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        start(
            command,
            cwd=folders[rank],
            env={
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": str(paths[rank]),
            },
        )
        for rank, command in enumerate(commands)
    ]
    try:
        told = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            end(rank)
    return [(rank.returncode, text) for rank, text in zip(ranks, told, strict=True)]


def _assert_refused(ends: list[tuple[int, str]], code: int, *parts: str) -> None:
    for got, told in ends:
        assert got == code, told
        assert "Traceback" not in told
        for part in parts:
            assert part in told


def test_ranks_with_different_settings_are_refused_naming_both_values(settings, tmp_path):
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}"]
    ends = _two_ranks([[*words, "optim.lr=2e-3"], [*words, "optim.lr=5e-3", "run.seed=3"]])
    _assert_refused(
        ends,
        2,
        "optim.lr=0.005 on rank 1 differs from the 0.002 of rank 0",
        "run.seed=3 on rank 1 differs from the 0 of rank 0",
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_rank_with_other_code_is_refused(settings, tmp_path):
    shutil.copytree(ROOT / "mmscale", tmp_path / "mmscale")
    with (tmp_path / "mmscale" / "loss" / "softmax.py").open("a") as file:
        file.write("# another version\n")
    words = [*settings, f"run.dir={tmp_path / 'run'}"]
    commands = [[*ALONE, *words], [sys.executable, tmp_path / "mmscale" / "train.py", *words]]
    ends = _two_ranks(commands, paths=(ROOT, tmp_path))
    _assert_refused(ends, 6, "rank 1 runs another mmscale", "the same checkout")


@pytest.mark.slow
def test_a_rank_with_other_shards_is_refused(settings, tmp_path):
    """The same relative path on two nodes, whose disks hold different shards."""
    for seed, node in enumerate(("one", "two")):
        render(tmp_path / f"source-{node}", SynthSettings(96, seed=seed, size=64, val=16, test=16))
        pack(tmp_path / f"source-{node}", tmp_path / node, PackSettings(samples_per_shard=32))
    words = [sys.executable, TRAIN, settings[0], "data.train=train", "data.eval=val"]
    words += [f"run.dir={tmp_path / 'run'}"]
    ends = _two_ranks([words, words], folders=(tmp_path / "one", tmp_path / "two"))
    _assert_refused(ends, 4, "data.train=train: rank 1 reads other shards than rank 0")


def test_a_folder_with_a_run_in_it_is_refused_on_every_rank(settings, tmp_path):
    """The first goes on as if nothing had been; its folder is free when it has ended."""
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}"]
    first = start([*words, "train.duration=100000 steps"])
    try:
        while not (folder / "metrics.jsonl").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        _assert_refused(
            _two_ranks([words, words]),
            2,
            f"run.dir={folder}: another run is in this folder",
            f"process {first.pid} on {socket.gethostname()}",
        )
        first.terminate()
        _, told = first.communicate(timeout=90)
    finally:
        end(first)
    assert first.returncode == 143, told
    steps = training_lines(folder)[-1]["step"]
    assert [line["step"] for line in training_lines(folder)] == list(range(1, steps + 1))
    succeed([*words, f"train.duration={steps} steps"])


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(settings, tmp_path):
    """By the same words, as a queue starts it again; by others it is another run."""
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", "checkpoint.every=100000 steps"]
    endless = [*words, "train.duration=100000 steps"]
    interrupt_after(endless, folder, 2, lambda process: process.kill())
    log = (folder / "metrics.jsonl").read_bytes()
    done = run([*endless, "optim.lr=0.0025"])
    assert done.returncode == 2, explain(done)
    assert f"run.dir={folder} holds another run (optim.lr=0.001 there, 0.0025 here)" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == log
    succeed([*words, "train.duration=3 steps"])
    assert [line["step"] for line in training_lines(folder)] == [1, 2, 3]


def test_a_disk_without_room_for_two_checkpoints_is_refused(settings, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        done = run([*ALONE, *settings, f"run.dir={disk / 'run'}"])
        assert done.returncode == 2, explain(done)
        assert f"run.dir={disk / 'run'}: 1.0 MB are free, and 2 checkpoints" in done.stderr
        assert list(Path(disk).rglob("*.safetensors")) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
