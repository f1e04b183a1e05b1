"""What only a card can show: its arithmetic, its precisions, its engines, and that nothing waits.

One card has one rank: what takes several is proved on CPUs, in `tests/ranks`.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.emulated.run import STRICT
from tests.whole.command import end, explain, run, start
from tests.whole.small_run import training_lines, words_for, write_settings

pytestmark = pytest.mark.gpu
CHUNKS = ["train.micro_batch_size=4"]
QUEUE = ["negatives.queue={size: 40, source: momentum}", "eval.weights=ema"]
OFFLOAD = "ds_configs/zero3_offload.json"


@pytest.fixture
def losses(synthetic, tmp_path):
    """Losses, and gradient norms of a tower, of a run of ten updates."""

    def of(name: str, *words: str, where: str = "cuda", **env: str) -> list[tuple[float, float]]:
        folder = tmp_path / name
        folder.mkdir()
        given = [*words_for(synthetic, write_settings(folder)), f"run.dir={folder / 'run'}"]
        command = [sys.executable, "-m", "tests.emulated.run", where, folder / "report.json"]
        device = "engine.device=cpu" if where == "cpu" else "engine.device=cuda"
        given += ["train.duration=10 steps", "engine.precision=fp32", device, *words]
        done = run([*command, *given], timeout=200, env=env)
        assert done.returncode == 0, explain(done)
        lines = training_lines(folder / "run")
        assert len(lines) == 10
        return [(line["loss"], line["grad_norm_vision"]) for line in lines]

    return of


def alike(some, others, share):
    """Ten pairs of figures within a share of each other."""
    assert len(some) == len(others)
    for mine, theirs in zip(some, others, strict=True):
        assert mine == pytest.approx(theirs, rel=share)


def test_a_run_is_that_of_a_cpu_and_waits_for_nothing(losses):
    words = [*CHUNKS, *QUEUE, "log.every=1 steps", "probe.every=10 steps"]
    card = losses("card", *words, **{STRICT: "1"})
    alike(card, losses("cpu", *words, where="cpu"), 1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_chunks_are_the_whole_batch_in_half_precision(losses, precision):
    # The first updates: later ones part by what rounding has done before.
    whole = losses("whole", f"engine.precision={precision}")
    chunks = losses("chunks", f"engine.precision={precision}", *CHUNKS)
    alike(chunks[:3], whole[:3], 0.05)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", OFFLOAD])
def test_zero_on_one_card_is_the_engine_without_it(losses, stage):
    pytest.importorskip("deepspeed")
    alike(losses("zero", f"engine.deepspeed={stage}", *CHUNKS), losses("plain", *CHUNKS), 1e-3)


def test_offload_in_fp16_clips_what_was_unscaled(losses):
    pytest.importorskip("deepspeed")
    words = ["engine.precision=fp16", *CHUNKS]
    alike(
        losses("zero", f"engine.deepspeed={OFFLOAD}", *words)[:3], losses("plain", *words)[:3], 0.05
    )


def test_compiled_blocks_train_as_the_librarys(losses):
    alike(losses("compiled", "engine.compile=blocks", *CHUNKS), losses("plain", *CHUNKS), 1e-3)


def test_a_run_that_was_killed_goes_on(synthetic, tmp_path):
    settings = words_for(synthetic, write_settings(tmp_path))
    words = [
        "python",
        "mmscale/train.py",
        *settings,
        "engine.device=cuda",
        "checkpoint.every=2 steps",
    ]
    words = [sys.executable, *words[1:], "train.duration=40 steps", f"run.dir={tmp_path / 'run'}"]
    process = start(words)
    try:
        wait_for_line(tmp_path / "run" / "checkpoints" / "step-00000004")
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        end(process)
    done = run(words, timeout=200)
    assert done.returncode == 0, explain(done)
    assert "resumed after step" in done.stdout + done.stderr
    assert [line["step"] for line in training_lines(tmp_path / "run")] == list(range(1, 41))


def wait_for_line(folder: Path) -> None:
    """Until a checkpoint is there."""
    for _ in range(1200):
        if folder.is_dir():
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} did not come")
