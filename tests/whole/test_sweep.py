"""A real sweep over the small run: stopped, killed, gone on with, shared by workers."""

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.whole.command import end, explain, run, start
from tests.whole.small_run import metrics, succeed, words_for, write_settings

pytest.importorskip("optuna")
TRIALS = 3


@pytest.fixture(scope="module")
def space(synthetic, tmp_path_factory) -> Path:
    """A search with evaluations after steps 4, 8 and 12, and a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("space")
    length = ["train.duration=12 steps", "eval.every=4 steps", "checkpoint.every=2 steps"]
    space = {
        "base": [*words_for(synthetic, write_settings(folder)), *length],
        "parameters": {
            "optim.lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2},
            "loss.preset": {"kind": "choice", "values": ["clip", "siglip"]},
        },
        "trials": TRIALS,
        "pruning": {"after_trials": 1, "after_evaluations": 1},
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    return path


def _sweep(space: Path, out: Path) -> list[str | Path]:
    return ["mmscale", "sweep", space, "--out", out, "--json", out.with_suffix(".json")]


def _found(out: Path) -> dict:
    return json.loads(out.with_suffix(".json").read_text("utf-8"))


def _in_trial(out: Path, number: int, process) -> Path:
    """The trial's folder, once it has trained for some steps."""
    folder = out / "trials" / f"{number:04d}"
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 5:
        assert process.poll() is None, "ended early:\n" + process.communicate()[1]
        assert time.monotonic() < deadline, f"trial {number} does not train"
        time.sleep(0.02)
    return folder


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_killed_finds_what_the_uninterrupted_one_finds(
    space, tmp_path
):
    straight, out = tmp_path / "straight", tmp_path / "out"
    done = succeed(_sweep(space, straight), timeout=400)
    assert "best: trial" in done.stdout
    process = start(_sweep(space, out))
    try:
        stopped = _in_trial(out, 0, process)
        process.terminate()
        assert process.wait(120) == 143
    finally:
        end(process)
    process = start(_sweep(space, out))
    try:
        _in_trial(out, 1, process)
    finally:
        end(process)  # by SIGKILL: the command, its worker and the training
    succeed(_sweep(space, out), timeout=400)
    assert _found(out) == _found(straight)
    assert "resumed after step" in (stopped / "stderr.txt").read_text("utf-8")
    kept = [path.parent.name for path in (out / "trials").glob("*/checkpoints")]
    assert kept == [f"{_found(out)['best']:04d}"]
    assert (out / "sweep.html").exists()


@pytest.mark.soak
def test_workers_share_the_trials_of_a_sweep(space, tmp_path):
    out = tmp_path / "out"
    succeed([*_sweep(space, out), "--workers", "2"], timeout=400)
    trials = _found(out)["trials"]
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}
    for trial in trials:
        lines = metrics(out / "trials" / f"{trial['number']:04d}")
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(1, len(steps) + 1)), "trained once, by one worker"
    # The same again has nothing left to do.
    before = _found(out)
    succeed(_sweep(space, out))
    assert _found(out) == before


def test_another_search_in_the_folder_and_a_wrong_one_are_refused(space, tmp_path):
    content = yaml.safe_load(space.read_text("utf-8"))
    out, wrong = tmp_path / "out", tmp_path / "wrong.yaml"
    out.mkdir()
    (out / "space.yaml").write_text(yaml.safe_dump(content))
    wrong.write_text(yaml.safe_dump({**content, "seed": 1}))
    done = run(_sweep(wrong, out))
    assert done.returncode == 2, explain(done)
    assert "seed=1 differs from the 0" in done.stderr
    wrong.write_text(yaml.safe_dump({**content, "trails": 3}))
    done = run(_sweep(wrong, out))
    assert done.returncode == 2, explain(done)
    assert "did you mean trials?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_training_that_fails_for_another_reason_ends_the_sweep_with_its_code(space, tmp_path):
    content = yaml.safe_load(space.read_text("utf-8"))
    other = tmp_path / "space.yaml"
    words = [word for word in content["base"] if not word.startswith("data.train")]
    other.write_text(yaml.safe_dump({**content, "base": [*words, "data.train=nowhere"]}))
    done = run(_sweep(other, tmp_path / "out"))
    assert done.returncode == 4, explain(done)
    assert "nowhere" in done.stderr
