"""Taught runs: by a model of Hugging Face's, by another run, stopped, and by a changed teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks.launch import run_on_ranks
from tests.unit.model.whole_hf import save_whole
from tests.whole.command import run
from tests.whole.small_run import (
    ALONE,
    checkpoints,
    course,
    training_lines,
    words_for,
    write_settings,
)

LENGTH = ["train.duration=6 steps", "checkpoint.every=3 steps", "data.image_size=40"]


def _runs(*runs: list[str]) -> list[int]:
    """One after another in this process; their exit codes."""
    from mmscale.train import main

    return [main(words) for words in runs]


def lives(*runs: list[str]) -> list[int]:
    (codes,) = run_on_ranks(1, _runs, *runs, join=False)
    return codes


def taught_by(*terms: dict) -> str:
    return "loss.terms=" + json.dumps([{"kind": "infonce"}, *terms])


def kept(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / "checkpoints" / f"step-{step:08d}").glob("rank-*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def taught(synthetic, tmp_path_factory):
    """Words of a run with a teacher of both forms, its folder, and the teacher's. Read only."""
    folder = tmp_path_factory.mktemp("taught")
    save_whole(folder / "clip", "clip")
    model = f"hf:{folder / 'clip'}"
    words = [
        *words_for(synthetic, write_settings(folder)),
        *LENGTH,
        "model.embed_dim=12",
        taught_by(
            {"kind": "teacher", "model": model},
            {"kind": "teacher", "model": model, "form": "feature", "weight": 0.5},
        ),
    ]
    again = [*words_for(synthetic, write_settings(folder)), *LENGTH, "model.embed_dim=20"]
    teacher = {"kind": "teacher", "model": str(folder / "run"), "temperature": 0.1}
    codes = lives(
        [*words, f"run.dir={folder / 'run'}"],
        [*again, taught_by(teacher), f"run.dir={folder / 'pupil'}"],
    )
    assert codes == [0, 0]
    return words, folder


def test_a_pupil_learns_what_its_teacher_finds_alike(taught):
    _, folder = taught
    lines = training_lines(folder / "run")
    assert len(lines) == 6
    for line in lines:
        assert line["loss/teacher_floor"] == line["loss/teacher_2_floor"] == 0
        assert line["loss/teacher_2_chance"] == 2
        total = line["loss/infonce"] + line["loss/teacher"] + 0.5 * line["loss/teacher_2"]
        assert line["loss"] == pytest.approx(total, rel=1e-6)
    assert lines[-1]["loss/teacher"] < lines[0]["loss/teacher"]
    # Nothing of the teacher is trained or kept.
    names = {name.partition("/")[2] for name in kept(folder / "run", 6)}
    assert not [name for name in names if name.startswith("teacher")]


def test_a_run_teaches_another_of_another_width(taught):
    _, folder = taught
    lines = training_lines(folder / "pupil")
    assert all(0 < line["loss/teacher"] < 2 for line in lines)
    assert lines[-1]["loss/teacher"] < lines[0]["loss/teacher"]


def test_a_taught_run_goes_on_bit_for_bit_and_only_with_its_teacher(taught, tmp_path):
    words, straight = taught
    folder = shutil.copytree(straight / "run", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert lives([*words, f"run.dir={folder}"]) == [0]
    assert checkpoints(folder) == checkpoints(straight / "run")
    assert course(folder) == course(straight / "run")
    again, wanted = kept(folder, 6), kept(straight / "run", 6)
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_run_does_not_go_on_with_another_teacher(taught, tmp_path):
    words, straight = taught
    folder = shutil.copytree(straight / "run", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    weights = straight / "clip" / "model.safetensors"
    before = weights.read_bytes()
    try:
        tensors = load_file(weights)
        tensors["logit_scale"] += 0.1
        save_file(tensors, weights, {"format": "pt"})
        done = run([*ALONE, *words, f"run.dir={folder}"])
    finally:
        weights.write_bytes(before)
    assert done.returncode == 2
    assert "which is not the model that the run was trained with" in done.stderr
