"""The guard of a real run: it ends a run that fails, on every rank."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.sealed import read_state_of, seal
from tests.whole.command import TRAIN, explain, run
from tests.whole.small_run import (
    checkpoints,
    deepspeed,
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
        # All of it lies within the grace, in which only a contraction counts.
        "guard.verdicts=[complete_collapse, dead_tower]",
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("deepspeed") is None, reason="no deepspeed")
def test_ranks_halt_together(words, tmp_path):
    zero = "engine.deepspeed=ds_configs/zero3.json"
    command = [*deepspeed(), *words, f"run.dir={tmp_path}", "guard.action=halt", zero]
    done = run(command, timeout=300)
    assert done.returncode == 3, explain(done)
    last = training_lines(tmp_path)[-1]["step"]
    assert last < 24
    assert checkpoints(tmp_path) == [f"step-{last:08d}"]


def test_a_run_that_changes_its_own_settings_is_refused(words, tmp_path):
    done = run([sys.executable, TRAIN, *words, f"run.dir={tmp_path}", "guard.action=remedy"])
    assert done.returncode == 2, explain(done)
    assert "guard.action='remedy' must be off, warn or halt" in done.stderr
    assert done.stderr.count("\n") == 1, explain(done)


@pytest.mark.parametrize("also_in_config", [pytest.param(False, marks=pytest.mark.slow), True])
def test_words_stored_in_a_checkpoint_are_no_words_of_the_user(
    words, synthetic, also_in_config, tmp_path
):
    """What a checkpoint from elsewhere says opens no pipe, whatever else it says to fit."""
    run_dir, marker = tmp_path / "run", tmp_path / "opened"
    command = [sys.executable, TRAIN, *words, f"run.dir={run_dir}", "guard.action=warn"]
    command += ["checkpoint.every=2 steps", "probe.every=4 steps"]
    succeed([*command, "train.duration=2 steps"])
    pipe = f"pipe:touch {marker}; cat {next(Path(synthetic.train).glob('*.tar'))}"
    folder = run_dir / "checkpoints" / "step-00000002"
    state = read_state_of(folder)
    if also_in_config:
        state["config"]["data"] |= {"allow_pipe": True, "train": pipe}
    else:
        state["state"]["remedies"] = ["data.allow_pipe=true", f"data.train={pipe}"]
    seal(folder, state)
    done = run([*command, "train.duration=4 steps"])
    assert not marker.exists(), explain(done)
    assert "allow_pipe=true" not in done.stdout
    assert done.returncode == (2 if also_in_config else 5), explain(done)
