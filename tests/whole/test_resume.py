"""A run that was stopped and goes on is the uninterrupted run, whatever stopped it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.state import RunState
from tests.whole.command import explain, run
from tests.whole.small_run import (
    ALONE,
    checkpoints,
    course,
    deepspeed,
    interrupt_after,
    metrics,
    succeed,
    torchrun,
    words_for,
    write_settings,
)

STEPS = 20
ZERO = "engine.deepspeed=ds_configs/zero{}.json"


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    """The configuration's words."""
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """An uninterrupted run on one device, with checkpoints after steps 10 and 20. Read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    succeed([*ALONE, *settings, f"run.dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def terminated(settings, tmp_path_factory):
    """A run that was told to end by SIGTERM in mid-run: its folder and how it ended."""
    folder = tmp_path_factory.mktemp("terminated") / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", "train.duration=100000 steps"]
    return folder, interrupt_after(words, folder, 5, lambda process: process.terminate())


def _copy(run_dir: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_dir, to / "run"))


def _cut_back(run_dir: Path, to: Path, step: int) -> Path:
    """The folder as a kill after the checkpoint of `step` leaves it: later lines, the last torn."""
    folder = _copy(run_dir, to)
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    log = folder / "metrics.jsonl"
    lines = [line for line in log.read_bytes().splitlines(True) if b'"finished"' not in line]
    log.write_bytes(b"".join(lines[: step + 3]) + lines[step + 3][:40])
    return folder


def _assert_whole(run_dir: Path) -> None:
    """Every step once and in order, one closing line, the last."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line.get("finished", False) for line in lines] == [False] * (len(lines) - 1) + [True]


def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_143(terminated):
    folder, done = terminated
    last = metrics(folder)[-1]["step"]
    assert done.returncode == 143, explain(done)
    assert 5 <= last < STEPS
    assert checkpoints(folder)[-1] == f"step-{last:08d}"
    assert f"step {last}" in done.stderr
    assert "Traceback" not in done.stderr, explain(done)


def test_going_on_after_sigterm_is_the_uninterrupted_run_bit_for_bit(
    settings, straight, terminated, tmp_path
):
    """Also: lines past the checkpoint and a torn last line are removed."""
    folder = _copy(terminated[0], tmp_path)
    done_before = course(folder)
    with (folder / "metrics.jsonl").open("a") as log:
        later = {"step": max(done_before) + 1, "loss": -1.0, "keys_digest": "from a lost step"}
        log.write(json.dumps(later) + '\n{"step": 9, "lo')
    succeed([*ALONE, *settings, f"run.dir={folder}"])
    assert course(folder) == course(straight)
    assert {step: course(folder)[step] for step in done_before} == done_before
    _assert_whole(folder)


@pytest.mark.parametrize(
    "name",
    [
        "rank-00000-of-00001.safetensors",
        pytest.param("state.json", marks=pytest.mark.slow),
    ],
)
def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_serves(
    settings, straight, tmp_path, name
):
    folder = _copy(straight, tmp_path)
    newest = folder / "checkpoints" / f"step-{STEPS:08d}" / name
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = succeed([*ALONE, *settings, f"run.dir={folder}"])
    said = done.stdout + done.stderr
    assert f"step-{STEPS:08d}" in said
    assert "falling back" in said
    assert "resumed after step 10" in said
    assert course(folder) == course(straight)
    _assert_whole(folder)


def test_the_best_checkpoint_by_a_metric_is_kept_and_used(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", "eval.every=4 steps", "checkpoint.keep=1"]
    succeed([*words, "checkpoint.best=eval/t2i_r5"])
    measured = {m["step"]: m["eval/t2i_r5"] for m in metrics(folder) if "eval/t2i_r5" in m}
    best = max(measured, key=lambda step: (measured[step], -step))
    assert checkpoints(folder) == sorted({f"step-{best:08d}", f"step-{STEPS:08d}"})
    found = tmp_path / "found.json"
    done = run(["mmscale", "eval", folder, "--data", settings[2][10:], "--json", found])
    assert done.returncode == 0, explain(done)
    assert json.loads(found.read_text())["t2i_r5"] == measured[best]


def test_a_finished_run_evaluates_prints_and_ends_with_0(settings, straight, tmp_path):
    folder = _copy(straight, tmp_path)
    before = course(folder)
    closing = metrics(folder)[-1]
    done = succeed([*ALONE, *settings, f"run.dir={folder}"])
    assert "R@1/5/10" in done.stdout + done.stderr
    assert course(folder) == before
    assert metrics(folder)[-1] == closing
    assert checkpoints(folder) == checkpoints(straight)


def test_never_resuming_refuses_a_used_folder(settings, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    done = run([*ALONE, *settings, f"run.dir={straight}", "run.resume=never"])
    assert done.returncode == 2, explain(done)
    assert "run.overwrite=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert (straight / "metrics.jsonl").read_bytes() == before
    assert len(checkpoints(straight)) == 2


def test_a_changed_setting_is_refused_with_both_values(settings, straight):
    config = (straight / "config.yaml").read_bytes()
    done = run([*ALONE, *settings, f"run.dir={straight}", "optim.lr=0.0025"])
    assert done.returncode == 2, explain(done)
    assert "optim.lr=0.0025" in done.stderr
    assert "0.001" in done.stderr.replace("0.0025", "")
    assert "Traceback" not in done.stderr
    assert (straight / "config.yaml").read_bytes() == config


def test_another_seed_is_another_run(settings, straight):
    done = run([*ALONE, *settings, f"run.dir={straight}", "run.seed=5"])
    assert done.returncode == 2, explain(done)
    assert "run.seed=5 differs from the 0" in done.stderr


def test_a_run_goes_on_where_its_data_have_moved_to(settings, straight, synthetic, tmp_path):
    """By paths that are spelt otherwise, and without the held-out pairs."""
    folder = _cut_back(straight, tmp_path, 10)
    shutil.copytree(synthetic.train, tmp_path / "elsewhere")
    words = ["data.train=elsewhere", "data.eval=null", "run.dir=run"]
    succeed([*ALONE, settings[0], *words], cwd=tmp_path)
    assert course(folder) == course(straight)
    _assert_whole(folder)


def test_a_checkpoint_of_another_architecture_is_refused_by_its_tensors(
    settings, straight, tmp_path
):
    checkpoint = straight / "checkpoints" / "step-00000010"
    other = [f"run.dir={tmp_path / 'other'}", f"run.resume={checkpoint}", "model.embed_dim=48"]
    done = run([*ALONE, *settings, *other])
    assert done.returncode == 5, explain(done)
    assert "[32, 64] there, [48, 64] here" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_run_begins_with_the_weights_of_a_run(settings, straight, tmp_path):
    """At its own beginning and with its own settings, where the first one's would be refused."""
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", f"model.weights={straight}"]
    succeed([*words, "optim.lr=0.0025", "train.duration=0 steps"])
    first = Checkpoint(folder / "checkpoints" / "step-00000000")
    last = Checkpoint(straight / "checkpoints" / f"step-{STEPS:08d}")
    assert first.state == RunState(lanes=last.state.lanes)
    assert set(first.tensors) == set(last.tensors)
    for name in last.tensors:
        assert first.read("value", name).equal(last.read("value", name)), name
        assert first.moments(name) == {}
    done = run([*words, "model.embed_dim=48", f"run.dir={tmp_path / 'wider'}"])
    assert done.returncode == 5, explain(done)
    assert "[32, 64] there, [48, 64] here" in done.stderr


def test_ctrl_c_ends_with_130(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", "train.duration=100000 steps"]
    # As a terminal does it: every process of the group, the decoding workers too.
    done = interrupt_after(words, folder, 3, lambda process: os.killpg(process.pid, signal.SIGINT))
    assert done.returncode == 130, explain(done)
    assert "mmscale: interrupted" in done.stderr


def _resumes_sharded(settings: list[str], tmp_path: Path, stage: int) -> None:
    words = [*settings, ZERO.format(stage)]
    whole = tmp_path / "straight"
    succeed([*deepspeed(), *words, f"run.dir={whole}"])
    folder = _cut_back(whole, tmp_path, 10)
    done = succeed([*deepspeed(), *words, f"run.dir={folder}"])
    assert "resumed after step 10" in done.stdout + done.stderr
    assert course(folder) == course(whole)
    _assert_whole(folder)


@pytest.mark.slow
def test_two_ranks_of_zero_2_go_on_bit_for_bit(settings, tmp_path):
    _resumes_sharded(settings, tmp_path, 2)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_ranks_of_other_stages_go_on_bit_for_bit(settings, tmp_path, stage):
    _resumes_sharded(settings, tmp_path, stage)


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("engine.deepspeed=zero2", "DeepSpeed ZeRO-2"),
        pytest.param("engine.kind=deepspeed", "DeepSpeed ZeRO-1", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_runs_alone_without_a_launcher(settings, straight, tmp_path, word, label):
    """It goes on from another engine's checkpoint besides, with the same rows and losses."""
    folder = _cut_back(straight, tmp_path, 10)
    done = succeed([*ALONE, *settings, word, f"run.dir={folder}"])
    assert label in done.stdout + done.stderr
    _assert_whole(folder)
    for step, (loss, digest) in course(straight).items():
        assert course(folder)[step] == (pytest.approx(loss, rel=1e-4), digest)


@pytest.mark.slow
def test_a_run_moves_between_worlds_stages_and_engines(settings, straight, tmp_path):
    """ZeRO-3 on two ranks, accelerate on one, ZeRO-1 on two, torchrun's two, five steps each."""
    folder = tmp_path / "run"
    words = [*settings, f"run.dir={folder}"]
    places = (
        [*deepspeed(), *words, ZERO.format(3)],
        [*ALONE, *words],
        [*deepspeed(), *words, ZERO.format(1)],
        [*torchrun(), *words],
    )
    for part, place in enumerate(places, start=1):
        succeed([*place, f"train.duration={STEPS * part // len(places)} steps"])
        assert max(course(folder)) == STEPS * part // len(places)
    _assert_whole(folder)
    wanted, got = course(straight), course(folder)
    for step in wanted:
        assert got[step][1] == wanted[step][1]
        assert got[step][0] == pytest.approx(wanted[step][0], rel=1e-4)
