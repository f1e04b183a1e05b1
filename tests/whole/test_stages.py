"""Runs with stages: resumed inside any of them they are the uninterrupted run, bit for bit."""

import math
from pathlib import Path

import pytest

from tests.whole.command import explain, run
from tests.whole.small_run import (
    ALONE,
    checkpoints,
    course,
    deepspeed,
    metrics,
    succeed,
    training_lines,
    words_for,
    write_settings,
)

# 6 steps, 4 with another batch (so from a new pass on) and a queue, and what is left of 20 x 16.
STAGES = """
stages:
- {name: heads, duration: 6 steps, train: [head, scale], optim: {lr: 2.0e-3}}
- name: queue
  duration: 4 steps
  train: [head, scale, "text[-1:]"]
  negatives: {queue: {size: 32}}
  global_batch_size: 8
- name: all
  duration: 5 steps
  optim: {lr_scale: {vision: 0.1}, layer_decay: {text: 0.5}}
  loss: {terms: [{kind: infonce}, {kind: hn_nce, beta: {from: 0, to: 0.5, over: 4 steps}}]}
checkpoint: {every: 2 steps, keep: 20}
"""
ENDS = (6, 10, 22)
SMALL_FUSION = ("model.fusion.layers=1", "model.fusion.dim=32", "model.fusion.heads=2")
ZERO3 = "engine.deepspeed=ds_configs/zero3.json"


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("settings")
    stages = folder / "stages.yaml"
    stages.write_text(STAGES, "utf-8")
    return [*words_for(synthetic, write_settings(folder)), str(stages)]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """An uninterrupted run on one device. Read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    succeed([*ALONE, *settings, f"run.dir={folder}"])
    return folder


def _go_on(words, straight: Path, step: int, folder: Path) -> None:
    """From the checkpoint of a step to the end, in another folder: the same losses and keys."""
    checkpoint = straight / "checkpoints" / f"step-{step:08d}"
    succeed([*words, f"run.dir={folder}", f"run.resume={checkpoint}"])
    wanted = {at: line for at, line in course(straight).items() if at > step}
    assert course(folder) == wanted
    assert metrics(folder)[-1]["finished"]


def test_a_run_goes_through_its_stages(straight):
    lines = [line for line in metrics(straight) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, ENDS[-1] + 1))
    assert [line["samples"] for line in lines][5:11] == [96, 104, 112, 120, 128, 144]
    for line in lines:
        frozen = line["step"] <= ENDS[1]
        assert (line["grad_norm_vision"] == 0) == frozen, line["step"]
        assert (line["grad_norm_text"] == 0) == (line["step"] <= ENDS[0])
        assert ("loss/hn_nce" in line) == (line["step"] > ENDS[1])
    assert lines[0]["lr"] == pytest.approx(1e-3), "half of 2e-3: warm-up over two updates"
    assert lines[5]["lr"] == pytest.approx(2e-3)
    assert lines[6]["lr"] == pytest.approx(5e-4), "each stage warms up again"
    assert len(checkpoints(straight)) == ENDS[-1] // 2


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(4, id="first", marks=pytest.mark.slow),
        pytest.param(6, id="border"),
        pytest.param(8, id="second"),
        pytest.param(14, id="third", marks=pytest.mark.slow),
    ],
)
def test_resumed_inside_a_stage_it_is_the_uninterrupted_run(settings, straight, tmp_path, step):
    _go_on([*ALONE, *settings], straight, step, tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_of_zero_3_resume_inside_a_stage(settings, straight, tmp_path):
    words = [*settings, ZERO3]
    succeed([*deepspeed(), *words, f"run.dir={tmp_path / 'straight'}"], timeout=300)
    _go_on([*deepspeed(), *words], tmp_path / "straight", 8, tmp_path / "run")
    wanted, got = course(straight), course(tmp_path / "straight")
    for step in wanted:
        assert got[step][1] == wanted[step][1], "the same rows in the same order"
        assert got[step][0] == pytest.approx(wanted[step][0], rel=1e-4)


def test_a_run_of_stages_is_evaluated_from_its_checkpoint(straight, synthetic):
    for step in (8, ENDS[-1]):
        checkpoint = straight / "checkpoints" / f"step-{step:08d}"
        done = succeed(["mmscale", "eval", checkpoint, "--data", synthetic.val])
        assert "t2i_r10" in done.stdout


@pytest.mark.slow
def test_the_three_stages_of_the_preset_train_to_their_end(synthetic, tmp_path):
    settings = words_for(synthetic, write_settings(tmp_path))
    folder = tmp_path / "run"
    own = ("model.preset=null", "train.duration=12 epochs", f"run.dir={folder}")
    succeed([*ALONE, "three_stage", *settings, *own, *SMALL_FUSION], timeout=300)
    lines = training_lines(folder)
    assert metrics(folder)[-1]["finished"]
    assert len(lines) == 72, "3, 3 and 6 epochs of 96 pairs"
    for line in lines:
        fuses, all_train = line["step"] > 18, line["step"] > 36
        assert ("loss/matching" in line) == fuses
        assert (line["grad_norm_vision"] > 0) == all_train
        # Matching and the queue's rows add to it, mining takes away.
        if not all_train:
            assert (line["loss_chance"] > math.log(16) + 0.5) == fuses
    assert lines[-1]["loss"] < lines[36]["loss"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages=[{name: a, duration: 5 steps, train: [hed]}]", "'hed' of stage 'a' matches no"),
        ("optim.name=admaw", "did you mean adanw or adamw?"),
        ("train.duration=8 steps", "6 steps (heads) + 4 steps (queue)"),
    ],
)
def test_unknown_patterns_and_optimizers_and_too_long_stages_exit_with_2(
    settings, tmp_path, word, said
):
    done = run([*ALONE, *settings, f"run.dir={tmp_path / 'run'}", word])
    assert done.returncode == 2, explain(done)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
