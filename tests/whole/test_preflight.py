"""Ranks that were not started alike, and a disk that is too small, are refused before a step."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.data.pack import pack
from mmscale.data.synth import render
from tests.ranks.launch import free_port
from tests.whole.command import ROOT, TRAIN, end, explain, run, start
from tests.whole.small_run import ALONE, words_for, write_settings


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
        render(tmp_path / f"source-{node}", 96, seed=seed, size=64, val=16, test=16)
        pack(tmp_path / f"source-{node}", tmp_path / node, samples_per_shard=32)
    words = [sys.executable, TRAIN, settings[0], "data.train=train", "data.eval=val"]
    words += [f"run.dir={tmp_path / 'run'}"]
    ends = _two_ranks([words, words], folders=(tmp_path / "one", tmp_path / "two"))
    _assert_refused(ends, 4, "data.train=train: rank 1 reads other shards than rank 0")


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
