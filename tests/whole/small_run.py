"""A small run over the synthetic pairs: what the tests of real launches start and read."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import SyntheticPairs
from tests.ranks.launch import free_port
from tests.whole.command import TRAIN, end, explain, run, start

# 96 pairs give six batches of 16 an epoch, without a remainder.
SETTINGS = """
data: {image_size: 32, workers: 1}
model:
  vision:
    name: timm:convnext_atto
    weights: random
    options: {depths: [1, 1, 1, 1], dims: [16, 32, 48, 64]}
  text:
    name: openclip:ViT-B-32
    weights: random
    options: {width: 64, layers: 1, heads: 2, context_length: 32}
  embed_dim: 32
train: {duration: 20 steps, global_batch_size: 16}
optim: {lr: 1e-3, warmup: 2 steps, schedule: constant}
eval: {every: null}
checkpoint: {every: 10 steps, keep: 10}
# Its pictures take as long as all the rest.
log: {page: false}
"""
ALONE = (sys.executable, TRAIN)


def write_settings(folder: Path) -> Path:
    """The small run's YAML; data and run folder come as words."""
    path = folder / "small.yaml"
    path.write_text(SETTINGS, "utf-8")
    return path


def words_for(pairs: SyntheticPairs, settings: Path) -> list[str]:
    """The configuration's words, the run folder excepted."""
    return [str(settings), f"data.train={pairs.train}", f"data.eval={pairs.val}"]


def deepspeed() -> tuple[str | Path, ...]:
    """DeepSpeed's launcher with two ranks."""
    return ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), TRAIN)


def torchrun() -> tuple[str | Path, ...]:
    """torchrun with two ranks."""
    return ("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), TRAIN)


def succeed(words: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with 0."""
    done = run(words, **options)
    assert done.returncode == 0, explain(done)
    return done


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of the run's log; a line that is not JSON fails the test."""
    text = (run_dir / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of updates."""
    return [line for line in metrics(run_dir) if "loss" in line]


def course(run_dir: Path) -> dict[int, tuple[float, str]]:
    """Loss and digest of the keys by step."""
    return {line["step"]: (line["loss"], line["keys_digest"]) for line in training_lines(run_dir)}


def checkpoints(run_dir: Path) -> list[str]:
    """Names in the checkpoint folder, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def interrupt_after(
    words: list[str | Path],
    run_dir: Path,
    steps: int,
    send: Callable[[subprocess.Popen[str]], None],
    timeout: float = 90,
) -> subprocess.CompletedProcess[str]:
    """Start a run, act on it once it has logged some steps, and wait for its end."""
    process, log = start(words), run_dir / "metrics.jsonl"
    try:
        deadline = time.monotonic() + timeout
        while not log.exists() or log.read_bytes().count(b"\n") < steps:
            assert process.poll() is None, "ended early:\n" + process.communicate()[1]
            assert time.monotonic() < deadline, f"no {steps} steps within {timeout} s"
            time.sleep(0.02)
        send(process)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        end(process)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
