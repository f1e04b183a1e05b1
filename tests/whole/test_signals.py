"""SIGTERM and Ctrl-C at any moment: one line, the right code, and what was computed is kept."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmscale.config.load import load_config
from mmscale.errors import TerminatedError
from tests.ranks.launch import run_on_ranks
from tests.whole.command import end, explain, start
from tests.whole.small_run import (
    ALONE,
    checkpoints,
    course,
    metrics,
    succeed,
    words_for,
    write_settings,
)

FROZEN = ["model.vision.frozen=true", "model.text.frozen=true", "data.augment=none"]


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


def to_process(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)


def to_group(process: subprocess.Popen[str], number: int) -> None:
    os.killpg(process.pid, number)


def _imports_torch(process: subprocess.Popen[str]) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text("utf-8")


def _ended(
    words: list[str | Path],
    number: int,
    ready: Callable[[subprocess.Popen[str]], bool],
    send: Callable[[subprocess.Popen[str], int], None] = to_process,
) -> subprocess.CompletedProcess[str]:
    """Start a command, send it a signal once it is ready, and wait for its end."""
    process = start(words)
    try:
        deadline = time.monotonic() + 90
        while not ready(process):
            assert process.poll() is None, "ended early:\n" + process.communicate()[1]
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.01)
        send(process, number)
        told = process.communicate(timeout=60)
    finally:
        end(process)
    return subprocess.CompletedProcess(words, process.returncode, *told)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "told to stop"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_while_libraries_are_imported_ends_in_one_line(
    settings, tmp_path, number, code, word
):
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}"]
    done = _ended(words, number, _imports_torch, to_group)
    assert done.returncode == code, explain(done)
    assert done.stderr == (
        f"mmscale: {word}; no checkpoint was written yet, the same command begins anew\n"
    )


def _tenth(process: subprocess.Popen[str]) -> bool:
    """The next line that the command tells is of a feature pass that has begun."""
    assert process.stderr
    return "of this rank's" in process.stderr.readline()


def _in_the_feature_pass(settings, tmp_path, send) -> list[str | Path]:
    """A command that a signal has ended there."""
    words = [*ALONE, *settings, *FROZEN, "eval.batch_size=2", "train.duration=2 steps"]
    words += [f"data.feature_cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    done = _ended(words, signal.SIGTERM, _tenth, send)
    assert done.returncode == 143, explain(done)
    assert "Traceback" not in done.stderr, explain(done)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mmscale: told to stop; ")
    assert last.endswith("begins anew, with the features computed so far")
    assert list((tmp_path / "cache").iterdir()), "what was computed"
    return words


def test_a_signal_to_a_whole_job_in_its_feature_pass_keeps_the_features(settings, tmp_path):
    _in_the_feature_pass(settings, tmp_path, to_group)


@pytest.mark.slow
def test_a_feature_pass_goes_on_where_it_was_cut_short(settings, tmp_path):
    words = _in_the_feature_pass(settings, tmp_path, to_process)
    done = succeed(words)
    assert "images are there from a pass that was cut short" in done.stderr
    # As without an interruption, and nothing is left but the two tables.
    assert len(list((tmp_path / "cache").iterdir())) == 2
    other = [f"data.feature_cache={tmp_path / 'other'}", f"run.dir={tmp_path / 'plain'}"]
    succeed([*words, *other])
    assert course(tmp_path / "run") == course(tmp_path / "plain")


def _interrupted_evaluation(words: list[str], folder: Path) -> str:
    """Train until SIGTERM comes to one rank, in its first evaluation."""
    from mmscale.train import run

    def strike() -> None:
        while not (folder / "metrics.jsonl").exists() or not metrics(folder):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(TerminatedError) as ended:
        run(load_config(words))
    return str(ended.value)


def test_a_signal_to_one_of_two_evaluating_ranks_leaves_a_checkpoint(settings, synthetic, tmp_path):
    """Told to one of them: both leave after the same batch, with a checkpoint."""
    folder = tmp_path / "run"
    # What is started by a forkserver has nothing to start its own from.
    more = ["eval.every=1 steps", "eval.batch_size=1", "train.duration=2 steps", "data.workers=0"]
    words = [*settings, *more, f"data.eval={synthetic.train}", f"run.dir={folder}"]
    told = run_on_ranks(2, _interrupted_evaluation, words, folder, join=False)
    assert told == ["told to stop; step 1 is in a checkpoint"] * 2
    assert checkpoints(folder) == ["step-00000001"]
    assert not [line for line in metrics(folder) if "eval/mean" in line]
    succeed([*ALONE, *words])
    assert [line["step"] for line in metrics(folder) if "eval/mean" in line] == [1, 2, 2]


def test_a_signal_in_the_last_evaluation_keeps_the_trained_weights(settings, synthetic, tmp_path):
    """In the evaluation at the end: the trained weights are kept, and the run is made whole."""
    folder = tmp_path / "run"
    words = [*ALONE, *settings, "eval.batch_size=1", "train.duration=1 steps"]
    words += [f"data.eval={synthetic.train}", f"run.dir={folder}"]
    log = folder / "metrics.jsonl"
    done = _ended(words, signal.SIGTERM, lambda _: log.exists() and bool(metrics(folder)))
    assert done.returncode == 143, explain(done)
    assert "told to stop; step 1 is in a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(folder) == ["step-00000001"]
    succeed(words)
    assert metrics(folder)[-1]["finished"]


def test_ctrl_c_says_where_the_run_goes_on(settings, tmp_path):
    folder = tmp_path / "run"
    words = [*ALONE, *settings, "train.duration=100000 steps", "checkpoint.every=2 steps"]
    made = folder / "checkpoints" / "step-00000002"
    done = _ended([*words, f"run.dir={folder}"], signal.SIGINT, lambda _: made.exists(), to_group)
    assert done.returncode == 130, explain(done)
    assert "Traceback" not in done.stderr
    last = int(checkpoints(folder)[-1].split("-")[1].split(".")[0])
    said = done.stderr.splitlines()[-1]
    assert said.startswith("mmscale: interrupted; the same command goes on from step ")
    assert int(said.split()[-1]) <= last


@pytest.mark.parametrize("send", [to_process, to_group])
def test_a_signal_to_synth_ends_its_workers_too(synthetic, tmp_path, send):
    words = ["mmscale", "synth", "--images", "60000", "--workers", "2", "--out", tmp_path / "out"]
    images = tmp_path / "out" / "images"
    done = _ended(words, signal.SIGTERM, lambda _: images.exists() and any(images.iterdir()), send)
    assert done.returncode == 143, explain(done)
    assert done.stderr.splitlines()[-1] == (
        "mmscale: told to stop; the same command renders it again"
    )
    assert "Traceback" not in done.stderr
