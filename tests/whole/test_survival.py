"""What a run survives, and how it ends where it cannot: real signals, kills, hangs, full disks."""

import json
import os
import resource
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from mmscale.checkpoint.files import Checkpoint, step_folders
from tests.whole.command import TRAIN, explain, run
from tests.whole.outage import jumping_clock, silent_server
from tests.whole.processes import Launch, launched
from tests.whole.small_run import (
    ALONE,
    checkpoints,
    course,
    deepspeed,
    interrupt_after,
    metrics,
    succeed,
    torchrun,
    training_lines,
    words_for,
    write_settings,
)

ENDLESS = "train.duration=100000 steps"
ZERO_2 = "engine.deepspeed=ds_configs/zero2.json"
SECONDS = 30.0


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    """The configuration's words."""
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


def _steps(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return log.read_bytes().count(b'"loss"') if log.exists() else 0


def _wait(launch: Launch, condition, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert launch.process.poll() is None, "ended early:\n" + launch.process.communicate()[1]
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.02)


def _accelerate() -> tuple[str | Path, ...]:
    return ("accelerate", "launch", "--cpu", "--num_processes", "1", TRAIN)


def test_a_schedulers_early_warning_ends_with_a_checkpoint_and_143(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", ENDLESS]
    done = interrupt_after(words, folder, 3, lambda process: process.send_signal(signal.SIGUSR1))
    assert done.returncode == 143, explain(done)
    assert checkpoints(folder)[-1] == f"step-{training_lines(folder)[-1]['step']:08d}"


@pytest.mark.parametrize("launcher", [deepspeed, pytest.param(_accelerate, marks=pytest.mark.slow)])
def test_ranks_whose_launcher_was_told_to_end_write_a_checkpoint(settings, tmp_path, launcher):
    """Only the launcher gets the signal; it ends at once and tells its ranks nothing."""
    folder = tmp_path / "run"
    words = [*launcher(), *settings, f"run.dir={folder}", ENDLESS]
    with launched(words, env={"HF_HOME": str(tmp_path)}) as launch:
        _wait(launch, lambda: _steps(folder) >= 3, "3 steps")
        launch.process.send_signal(signal.SIGTERM)
        left = launch.left_after(SECONDS)
        told = launch.process.communicate()[1]
    assert left == [], told
    last = training_lines(folder)[-1]["step"]
    assert checkpoints(folder)[-1] == f"step-{last:08d}", told
    assert f"told to stop; step {last} is in a checkpoint" in told


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        (deepspeed, 1),
        pytest.param(torchrun, 0, marks=pytest.mark.slow),
        pytest.param(deepspeed, 0, marks=pytest.mark.soak),
        pytest.param(torchrun, 1, marks=pytest.mark.soak),
    ],
)
def test_a_killed_rank_ends_all_of_them_with_the_cause_told_last(
    settings, tmp_path, launcher, rank
):
    folder = tmp_path / "run"
    with launched([*launcher(), *settings, f"run.dir={folder}", ENDLESS]) as launch:
        _wait(launch, lambda: _steps(folder) >= 3, "3 steps")
        os.kill(launch.rank(rank), signal.SIGKILL)
        left = launch.left_after(SECONDS)
        told = launch.process.communicate()[1]
    assert left == [], told
    assert launch.process.returncode != 0
    last = [line for line in told.splitlines() if line.startswith("mmscale: ")][-1]
    assert f"rank {rank} ended without a word" in last, told
    assert "killed" in last


def test_a_killed_decoding_process_ends_the_run_with_6_and_a_sentence(settings, tmp_path):
    folder = tmp_path / "run"
    with launched([*ALONE, *settings, ENDLESS, f"run.dir={folder}"]) as launch:
        _wait(launch, lambda: _steps(folder) >= 2, "steps")
        (worker,) = launch.children(launch.process.pid)
        os.kill(worker, signal.SIGKILL)
        _, stderr = launch.process.communicate(timeout=60)
        assert launch.process.returncode == 6, stderr
        assert (
            f"mmscale: a decoding process (pid {worker}) was ended from outside (Killed)" in stderr
        )
        assert "Traceback" not in stderr
        assert not launch.left_after(SECONDS)


def test_a_batch_that_never_comes_ends_the_run_and_says_where_it_stood(settings, tmp_path):
    """The decoding process is stopped: it neither ends nor answers."""
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", ENDLESS, "engine.timeout=4"]
    with launched(words) as launch:
        _wait(launch, lambda: _steps(folder) >= 3, "3 steps")
        (worker,) = launch.children(launch.process.pid)
        os.kill(worker, signal.SIGSTOP)
        told = launch.process.communicate(timeout=60)[1]
    step = training_lines(folder)[-1]["step"] + 1
    assert launch.process.returncode == 6, told
    last = told.splitlines()[-1]
    where = f"the wait for the batch of step {step}"
    assert f"rank 0 stood still for 4 s (engine.timeout) in {where}" in last
    assert "most recent call first" in told
    assert "in _batches" in told


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_with_the_stacks_of_all(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*deepspeed(), *settings, f"run.dir={folder}", ENDLESS, ZERO_2, "engine.timeout=6"]
    with launched(words) as launch:
        _wait(launch, lambda: _steps(folder) >= 3, "3 steps")
        (worker,) = launch.children(launch.rank(1))
        os.kill(worker, signal.SIGSTOP)
        told = launch.process.communicate(timeout=90)[1]
    assert launch.process.returncode == 6, told
    assert "mmscale: rank 0 stands here:" in told
    assert "mmscale: rank 1 stands here:" in told
    assert "mmscale: rank 1 stood still for 6 s" in told
    assert "mmscale: rank 0 failed: rank 1" not in told
    assert "rank 1 failed: rank 1 stood still for 6 s" in told


@pytest.fixture(scope="module")
def frozen(settings, tmp_path_factory) -> tuple[list[str | Path], Path]:
    """A run over cached features: its words without folders, and where both lie. Read only."""
    folder = tmp_path_factory.mktemp("frozen")
    words = [
        *ALONE,
        *settings,
        "data.augment=none",
        "model.vision.frozen=true",
        "model.text.frozen=true",
        "checkpoint.every=2 steps",
    ]
    succeed([*words, f"data.feature_cache={folder / 'cache'}", f"run.dir={folder / 'run'}"])
    return words, folder


@pytest.fixture
def spoilt(frozen, synthetic, tmp_path) -> tuple[list[str | Path], str]:
    """The same words with a cache in which one image's features are not numbers, and its key."""
    words, folder = frozen
    with tarfile.open(min(synthetic.train.glob("*.tar"))) as shard:
        key = next(name[:-4] for name in shard.getnames() if name.endswith(".jpg"))
    _spoil(Path(shutil.copytree(folder / "cache", tmp_path / "cache")), {key})
    return [*words, f"data.feature_cache={tmp_path / 'cache'}"], key


def _spoil(cache: Path, keys: set[str]) -> None:
    """Not a number in the features of some images, in every table that holds them."""
    for path in cache.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        texts = json.loads(metadata["texts"])
        for place, key in enumerate(texts["keys"]):
            if key in keys:
                tensors["image"][place] = float("nan")
        save_file(tensors, path, metadata)


def _incidents(run_dir: Path) -> list[dict]:
    return [line for line in metrics(run_dir) if "incident" in line]


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_skipped_and_recorded(spoilt, tmp_path):
    (words, key), folder = spoilt, tmp_path / "run"
    succeed([*words, f"run.dir={folder}"])
    incidents = _incidents(folder)
    # 20 steps of 6 an epoch: the image comes three times, or four.
    assert {line["incident"] for line in incidents} == {"skipped"}
    assert len(incidents) in (3, 4)
    for line in incidents:
        assert [suspect.partition("#")[0] for suspect in line["suspects"]] == [key]
        assert len(line["keys"]) == 16
    assert training_lines(folder)[-1]["skipped"] == len(incidents)


def test_the_weights_go_back_past_the_batch_and_then_training_stops(frozen, spoilt, tmp_path):
    (words, key), folder = spoilt, tmp_path / "run"
    limits = ["train.non_finite.skips=0", "train.non_finite.rollbacks=2"]
    done = run([*words, f"run.dir={folder}", *limits])
    assert done.returncode == 3, explain(done)
    assert key in done.stderr.splitlines()[-1]
    incidents = _incidents(folder)
    assert [line["incident"] for line in incidents] == ["went_back", "went_back", "halted"]
    for line in incidents[:2]:
        assert line["weights_of_step"] == (line["step"] - 1) // 2 * 2, "of every second step"
        assert key in {suspect.partition("#")[0] for suspect in line["suspects"]}
    # The data goes on, each batch once, as in the sound run.
    lines, sound = training_lines(folder), course(frozen[1] / "run")
    assert [line["step"] for line in lines] == list(range(1, incidents[-1]["step"] + 1))
    assert all(line["keys_digest"] == sound[line["step"]][1] for line in lines)
    lost = sum(line["step"] - line["weights_of_step"] for line in incidents[:2])
    assert lines[-1]["skipped"] == lost + 1


# So fast that the first update leaves infinities in the weights.
TOO_FAST = ("optim.lr=3.4e38", "optim.warmup=0 steps", "optim.weight_decay=0.1")


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (ALONE, ["train.duration=1 steps", "data.eval=null"]),
        pytest.param(ALONE, ["train.duration=1 steps"], marks=pytest.mark.slow),
        pytest.param(ALONE, ["checkpoint.every=1 steps"], marks=pytest.mark.slow),
        pytest.param(
            deepspeed(),
            ["train.duration=1 steps", "data.eval=null", "engine.deepspeed=zero3"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_weights_that_are_not_finite_end_with_3_and_are_not_kept(
    settings, tmp_path, launcher, words
):
    """At the last step too, whether or not anything is evaluated then."""
    done = run([*launcher, *settings, *TOO_FAST, *words, f"run.dir={tmp_path / 'run'}"])
    assert done.returncode == 3, explain(done)
    assert "not finite" in done.stderr.splitlines()[-1]
    assert step_folders(tmp_path / "run") == []
    assert "Traceback" not in done.stderr


def test_a_full_disk_during_a_save_is_reported_and_training_continues(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", ENDLESS, "checkpoint.every=4 steps"]
    with launched([*words, "checkpoint.failures=1000"]) as launch:
        _wait(launch, lambda: step_folders(folder), "checkpoint")
        soft, hard = resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE, (200_000, hard))
        steps = _steps(folder)
        _wait(launch, lambda: _steps(folder) > steps + 12, "12 further steps")
        before = step_folders(folder)[0]
        resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        _wait(launch, lambda: step_folders(folder)[0] > before, "checkpoint after that")
        launch.process.send_signal(signal.SIGTERM)
        told = launch.process.communicate(timeout=60)[1]
    assert launch.process.returncode == 143, told
    assert "File too large" in told
    assert "earlier checkpoints are untouched and training goes on" in told
    for path in step_folders(folder):
        Checkpoint(path)
    lines = [line["step"] for line in training_lines(folder)]
    assert lines == list(range(1, len(lines) + 1))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_5(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, f"run.dir={folder}", ENDLESS, "checkpoint.every=4 steps"]
    with launched([*words, "checkpoint.failures=1"]) as launch:
        _wait(launch, lambda: step_folders(folder), "checkpoint")
        hard = resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE, (200_000, hard))
        told = launch.process.communicate(timeout=90)[1]
    assert launch.process.returncode == 5, told
    assert "2 in a row" in told.splitlines()[-1]
    Checkpoint(step_folders(folder)[0])


@pytest.mark.slow
def test_a_silent_wandb_and_a_jumping_clock_change_no_loss(settings, tmp_path):
    """A web service that never answers, and a wall clock that jumps by two years at each look."""
    sound, folder = tmp_path / "sound", tmp_path / "run"
    words = [*ALONE, *settings, "train.duration=6 steps"]
    succeed([*words, f"run.dir={sound}"])
    with silent_server() as address:
        wandb = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, **jumping_clock(tmp_path)}
        done = succeed([*words, f"run.dir={folder}", "log.wandb=online"], env=wandb)
    assert course(folder) == course(sound)
    assert "wandb" in done.stderr
    assert "Traceback" not in done.stderr, explain(done)
    assert metrics(folder)[-1]["finished"]
