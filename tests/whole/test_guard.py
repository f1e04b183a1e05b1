"""The guard of a real run: it ends a run that fails, or mends it once and says so for good."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.whole.command import TRAIN, explain, run
from tests.whole.small_run import (
    checkpoints,
    deepspeed,
    metrics,
    succeed,
    training_lines,
    write_settings,
)

# Ten times too fast: the text tower dies within some steps.
FAST = "optim.lr=0.01"


@pytest.fixture(scope="module")
def words(synthetic, tmp_path_factory):
    """Enough pairs in a batch for a verdict, and probes that come often."""
    settings = write_settings(tmp_path_factory.mktemp("guard"))
    return [
        str(settings),
        f"data.train={synthetic.train}",
        f"data.eval={synthetic.train}",
        "train.global_batch_size=48",
        "train.duration=24 steps",
        "probe.every=2 steps",
        FAST,
    ]


def test_halt_ends_with_3_a_checkpoint_and_a_diagnosis(words, tmp_path):
    done = run([sys.executable, TRAIN, *words, f"run.dir={tmp_path}", "guard.action=halt"])
    assert done.returncode == 3, explain(done)
    assert "the probes say dead_tower since step" in done.stderr
    doctor = json.loads((tmp_path / "doctor.json").read_text("utf-8"))
    last = training_lines(tmp_path)[-1]["step"]
    assert doctor["verdict"] == "dead_tower"
    assert 0 < doctor["since_step"] < last < 24
    assert checkpoints(tmp_path) == [f"step-{last:08d}"]


def assert_mended(run_dir: Path, stderr: str) -> None:
    mark = next(line for line in metrics(run_dir) if "remedies" in line)
    assert mark["step"] == 0, "the only checkpoint before the first probe"
    assert mark["remedies"] == ["optim.lr=0.001"]
    assert "going back to step 0 with optim.lr=0.001" in stderr
    lines = training_lines(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert max(line["lr"] for line in lines) == pytest.approx(0.001)
    folder = run_dir / "checkpoints" / checkpoints(run_dir)[-1]
    state = json.loads((folder / "state.json").read_text("utf-8"))
    assert state["remedies"] == ["optim.lr=0.001"]
    assert state["config"]["optim"]["lr"] == 0.001


def test_a_remedy_is_set_once_and_again_on_resume(words, tmp_path):
    command = [sys.executable, TRAIN, *words, f"run.dir={tmp_path}", "guard.action=remedy"]
    assert_mended(tmp_path, succeed(command).stderr)
    again = succeed([*command, "train.duration=26 steps"])
    assert "this run goes on with optim.lr=0.001" in again.stderr
    assert training_lines(tmp_path)[-1]["lr"] == pytest.approx(0.001)
    assert training_lines(tmp_path)[-1]["step"] == 26


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.skipif(shutil.which("deepspeed") is None, reason="no deepspeed")
def test_ranks_go_back_together(words, tmp_path, stage):
    done = succeed(
        [
            *deepspeed(),
            *words,
            f"run.dir={tmp_path}",
            "guard.action=remedy",
            f"engine.deepspeed=ds_configs/zero{stage}.json",
        ],
        timeout=300,
    )
    assert_mended(tmp_path, done.stderr + done.stdout)
