"""Two nodes without a scheduler: a launcher on each, here both on this machine."""

import time
from pathlib import Path

import pytest

from tests.ranks.launch import free_port
from tests.whole.command import TRAIN, end, start
from tests.whole.small_run import (
    ALONE,
    course,
    metrics,
    succeed,
    training_lines,
    words_for,
    write_settings,
)

pytestmark = pytest.mark.slow
STEPS = 20
ZERO_2 = "engine.deepspeed=ds_configs/zero2.json"


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    """The configuration's words."""
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> dict[int, tuple[float, str]]:
    """Loss and digest by step of the run on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    succeed([*ALONE, *settings, f"run.dir={folder}"])
    return course(folder)


def _deepspeed(tmp_path: Path) -> list[list[str | Path]]:
    """The commands that are typed on each of two nodes."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = ["--hostfile", hostfile, "--no_ssh", *meeting]
    return [["deepspeed", *nodes, "--node_rank", str(rank), TRAIN] for rank in range(2)]


def _torchrun(tmp_path: Path) -> list[list[str | Path]]:
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", *meeting]
    return [["torchrun", *nodes, "--node_rank", str(rank), TRAIN] for rank in range(2)]


def _wait(processes, seconds: float = 240) -> tuple[list[int], str]:
    """Exit codes of both nodes' launchers, and what they said."""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], "\n".join(map("\n".join, said))


def _wait_for_steps(run_dir: Path, process, steps: int) -> None:
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, "ended early:\n" + process.communicate()[1]
        assert time.monotonic() < deadline, f"no {steps} steps"
        time.sleep(0.05)


@pytest.mark.parametrize(("launchers", "words"), [(_deepspeed, [ZERO_2]), (_torchrun, [])])
def test_two_nodes_train_as_one_device_does(settings, alone, tmp_path, launchers, words):
    run_dir = tmp_path / "run"
    words = [*settings, *words, f"run.dir={run_dir}"]
    processes = [start([*launcher, *words]) for launcher in launchers(tmp_path)]
    try:
        codes, said = _wait(processes)
    finally:
        for process in processes:
            end(process)
    assert codes == [0, 0], said[-6000:]
    assert "2 ranks x 8 rows" in said
    found = course(run_dir)
    assert list(found) == list(range(1, STEPS + 1))
    assert [digest for _, digest in found.values()] == [digest for _, digest in alone.values()]
    losses = [loss for loss, _ in alone.values()]
    assert [loss for loss, _ in found.values()] == pytest.approx(losses, rel=1e-4)
    assert metrics(run_dir)[-1]["finished"]


def test_sigterm_on_one_node_writes_a_checkpoint_and_the_same_command_goes_on(
    settings, alone, tmp_path
):
    run_dir = tmp_path / "run"
    words = [*settings, f"run.dir={run_dir}"]
    endless = [*words, "train.duration=1000000 steps"]
    processes = [start([*launcher, *endless]) for launcher in _torchrun(tmp_path)]
    try:
        _wait_for_steps(run_dir, processes[0], 5)
        processes[1].terminate()
        codes, said = _wait(processes, 60)
    finally:
        for process in processes:
            end(process)
    assert codes == [1, 1], said[-6000:]
    last = training_lines(run_dir)[-1]["step"]
    assert f"told to stop; step {last} is in a checkpoint" in said
    # One device goes on where two nodes stopped, to the end or a little past it.
    steps = max(STEPS, last + 3)
    succeed([*ALONE, *words, f"train.duration={steps} steps"])
    digests = {step: digest for step, (_, digest) in course(run_dir).items()}
    assert list(digests) == list(range(1, steps + 1))
    assert {step: digests[step] for step in alone} == {s: d for s, (_, d) in alone.items()}


def test_a_node_that_is_gone_ends_the_other(settings, tmp_path):
    run_dir = tmp_path / "run"
    words = [*settings, ZERO_2, f"run.dir={run_dir}", "train.duration=1000000 steps"]
    processes = [start([*launcher, *words]) for launcher in _deepspeed(tmp_path)]
    try:
        _wait_for_steps(run_dir, processes[0], 5)
        # The launcher and its rank, as when a machine loses its power.
        end(processes[1])
        begun = time.monotonic()
        _, stderr = processes[0].communicate(timeout=60)
        assert time.monotonic() - begun < 30
    finally:
        for process in processes:
            end(process)
    assert processes[0].returncode == 6, stderr[-6000:]
    assert "rank 1 ended without a word" in stderr
