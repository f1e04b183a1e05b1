"""Several real processes pack one data set: their shards are those of one process."""

import os
import signal
import subprocess
import sys

import pytest

from mmscale.data.pack import PackSettings, pack
from mmscale.data.pack_folder import PackPart
from mmscale.data.synth import SynthSettings, render
from mmscale.data.verify import verify
from mmscale.errors import ConfigError, DataError
from tests.whole.command import BIN, ROOT, environment


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    render(folder, SynthSettings(60, seed=0, size=32))
    return folder


@pytest.fixture(scope="module")
def straight(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    pack(scenes, folder, PackSettings(samples_per_shard=5))
    return contents(folder)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_parts_one_after_the_other_make_the_whole(scenes, straight, tmp_path):
    for number in (2, 3):
        results = pack(
            scenes, tmp_path, PackSettings(samples_per_shard=5), part=PackPart(number, 3)
        )
        assert not list(tmp_path.rglob("manifest.json"))
    assert "other parts have 4 shards to write" in str(results[0])
    results = pack(scenes, tmp_path, PackSettings(samples_per_shard=5), part=PackPart(1, 3))
    assert [result.missing for result in results] == [0, 0, 0]
    assert contents(tmp_path) == straight


def test_a_part_that_failed_may_be_left_to_a_whole_pack(scenes, straight, tmp_path):
    pack(scenes, tmp_path, PackSettings(samples_per_shard=5), part=PackPart(2, 5))
    results = pack(scenes, tmp_path, PackSettings(samples_per_shard=5))
    assert sum(result.kept for result in results) == 2
    assert contents(tmp_path) == straight


def test_more_parts_than_shards(scenes, tmp_path):
    for number in range(1, 6):
        pack(
            scenes,
            tmp_path,
            PackSettings(split="val", samples_per_shard=5),
            part=PackPart(number, 5),
        )
    assert verify(tmp_path) == []


def array_task(words, folder, number, count, **settings):
    """Task `number` of a job array, with an `srun` that starts its words here."""
    (folder / "bin").mkdir(exist_ok=True)
    srun = folder / "bin" / "srun"
    if not srun.exists():
        srun.write_text('#!/bin/sh\nexec "$@"\n')
        srun.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": "4",
        "SLURM_ARRAY_TASK_MAX": str(4 + count - 1),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "VIRTUAL_ENV": str(BIN.parent),
    }
    inherited = environment()
    return subprocess.Popen(
        ["bash", str(ROOT / "slurm" / "pack.sbatch"), *words],
        env={
            **inherited,
            **job,
            **settings,
            "PATH": f"{folder / 'bin'}{os.pathsep}{inherited['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_job_array_packs_side_by_side(scenes, straight, tmp_path):
    out = tmp_path / "out"
    words = [str(scenes), "--out", str(out), "--samples-per-shard", "5"]
    tasks = [array_task(words, tmp_path, number, 3) for number in (4, 5, 6)]
    said = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert contents(out) == straight


def test_an_array_with_gaps_is_refused(scenes, tmp_path):
    words = [str(scenes), "--out", str(tmp_path / "out")]
    task = array_task(words, tmp_path, 4, 3, SLURM_ARRAY_TASK_COUNT="2")
    assert "submit --array=1-3" in task.communicate(timeout=60)[1]
    assert task.returncode == 2
    assert not (tmp_path / "out").exists()


HOLD = """
import sys, time
from pathlib import Path
from mmscale.data import shard_writer
from mmscale.data.pack import PackSettings, pack

def wait(*arguments):
    print("writing", flush=True)
    time.sleep(60)

shard_writer.prepare_image = wait
settings = PackSettings(split="val", samples_per_shard=5)
pack(Path(sys.argv[1]), Path(sys.argv[2]), settings)
"""


def test_two_processes_never_write_one_shard_and_a_killed_one_leaves_no_claim(scenes, tmp_path):
    words = [sys.executable, "-c", HOLD, str(scenes), str(tmp_path)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "writing\n"
    with pytest.raises(DataError, match=r"\.val-000000\.tar\.part: another process is writing it"):
        pack(scenes, tmp_path, PackSettings(split="val", samples_per_shard=5))
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    pack(scenes, tmp_path, PackSettings(split="val", samples_per_shard=5))
    assert verify(tmp_path) == []


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.5/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="is not a part of a whole"):
        PackPart.parse(text)


def test_a_part_is_read_from_its_text():
    assert PackPart.parse("2/8") == PackPart(2, 8)
