"""Taught runs: by a model of Hugging Face's, by another run, stopped, and by a changed teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks.launch import run_on_ranks
from tests.unit.model.whole_hf import save_whole
from tests.whole.small_run import (
    checkpoints,
    course,
    training_lines,
    words_for,
    write_settings,
)

pytestmark = pytest.mark.slow

LENGTH = [
    "train.duration=6 steps",
    "checkpoint.every=3 steps",
    "data.image_size=40",
    "data.workers=0",
]


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
            {"kind": "anchor", "weight": 2},
            {"kind": "l2_start", "weight": 0.5},
            {"kind": "anchor", "data": str(synthetic.val), "rows": 8},
        ),
    ]
    again = [*words_for(synthetic, write_settings(folder)), *LENGTH, "model.embed_dim=20"]
    teacher = {"kind": "teacher", "model": str(folder / "run"), "temperature": 0.1}
    frozen = [
        *words[:-1],
        *("model.vision.frozen=true", "model.text.frozen=true", "data.augment=none"),
        f"data.feature_cache={folder / 'cache'}",
        taught_by(
            {"kind": "teacher", "model": model, "cache": str(folder / "cache")},
            {"kind": "anchor", "data": str(synthetic.test), "rows": 8},
        ),
    ]
    # The anchor comes with the second stage, and has what was there before the first.
    staged = [
        *words[:-1],
        "stages=[{name: one, duration: 3 steps, train: ['*']}, {name: two, duration: 3 steps, "
        "train: ['*'], loss: {terms: [{kind: infonce}, {kind: anchor, weight: 2}]}}]",
    ]
    codes = lives(
        [*words, f"run.dir={folder / 'run'}"],
        [*again, taught_by(teacher), f"run.dir={folder / 'pupil'}"],
        [*frozen, f"run.dir={folder / 'frozen'}"],
        [*staged, f"run.dir={folder / 'staged'}"],
    )
    assert codes == [0, 0, 0, 0]
    return words, folder


def test_a_pupil_learns_what_its_teacher_finds_alike(taught):
    _, folder = taught
    lines = training_lines(folder / "run")
    assert len(lines) == 6
    for line in lines:
        assert line["loss/teacher_floor"] == line["loss/teacher_2_floor"] == 0
        assert line["loss/teacher_2_chance"] == 2
        total = line["loss/infonce"] + line["loss/teacher"] + 0.5 * line["loss/teacher_2"]
        total += 2 * line["loss/anchor"] + 0.5 * line["loss/l2_start"] + line["loss/anchor_2"]
        assert line["loss"] == pytest.approx(total, rel=1e-6)
    moved = [line["loss/l2_start"] for line in lines]
    assert moved[0] == 0 < min(moved[1:])
    held = [line["loss/anchor_2"] for line in lines]
    assert held[0] < 1e-9 < 1e-6 < min(held[1:])
    assert lines[-1]["loss/teacher"] < lines[0]["loss/teacher"]
    # Nothing of the teacher is trained or kept.
    names = {name.partition("/")[2] for name in kept(folder / "run", 6)}
    assert not [name for name in names if name.startswith("teacher")]


@pytest.mark.parametrize(("name", "first"), [("run", 0), ("staged", 3)])
def test_an_anchor_is_what_the_run_began_with_in_every_stage(taught, name, first):
    _, folder = taught
    distance = {x["step"] - 1: x.get("loss/anchor") for x in training_lines(folder / name)}
    assert [step for step in distance if distance[step] is None] == list(range(first))
    # The first update's rows are the start's own; those of the second stage have moved.
    assert (distance[first] < 1e-9) == (first == 0)
    assert distance[5] > 1e-6
    early, late = kept(folder / name, 3), kept(folder / name, 6)
    start = [tensor for tensor in early if tensor.startswith("value/start.")]
    assert len(start) == sum("value/" + x.removeprefix("value/start.") in early for x in start)
    assert all(torch.equal(early[tensor], late[tensor]) for tensor in start)
    moved = [x for x in start if not torch.equal(late[x], late["value/" + x[12:]])]
    assert len(moved) > len(start) / 2


def test_a_run_teaches_another_of_another_width(taught):
    _, folder = taught
    lines = training_lines(folder / "pupil")
    assert all(line["loss/teacher"] > 0 for line in lines)
    assert lines[-1]["loss/teacher"] < lines[0]["loss/teacher"]


def test_heads_on_cached_features_have_a_teacher_with_a_cache(taught):
    _, folder = taught
    lines = training_lines(folder / "frozen")
    assert lines[-1]["loss/teacher"] < lines[0]["loss/teacher"]
    # Of three sets through the towers, and of the training set through the teacher's.
    assert len(list((folder / "cache").glob("*.safetensors"))) == 4
    # The pairs that the anchor holds are where the start had them, and move as the heads do.
    held = [line["loss/anchor"] for line in lines]
    assert held[0] < 1e-9 < 1e-6 < min(held[1:])


def _resumed(words: list[str], run_dir: Path, other: Path, weights: Path) -> list[int]:
    """A run that goes on, then one that finds its teacher changed."""
    from mmscale.train import main

    codes, before = [main([*words, f"run.dir={run_dir}"])], weights.read_bytes()
    try:
        tensors = load_file(weights)
        tensors["logit_scale"] += 0.1
        save_file(tensors, weights, {"format": "pt"})
        return [*codes, main([*words, f"run.dir={other}"])]
    finally:
        weights.write_bytes(before)


def test_a_taught_run_goes_on_bit_for_bit_and_only_with_its_teacher(taught, tmp_path):
    words, straight = taught
    folders = [shutil.copytree(straight / "run", tmp_path / name) for name in ("run", "other")]
    for folder in folders:
        shutil.rmtree(folder / "checkpoints" / "step-00000006")
    weights = straight / "clip" / "model.safetensors"
    (codes,) = run_on_ranks(1, _resumed, words, *folders, weights, join=False)
    assert codes == [0, 2]
    folder, other = folders
    assert checkpoints(folder) == checkpoints(straight / "run")
    assert len(checkpoints(other)) == len(checkpoints(folder)) - 1
    assert course(folder) == course(straight / "run")
    again, wanted = kept(folder, 6), kept(straight / "run", 6)
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("more", [[], ["engine.deepspeed=zero3"]])
def test_a_run_stays_near_the_same_start_in_another_world_and_engine(taught, tmp_path, more):
    words, straight = taught
    folder = shutil.copytree(straight / "run", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    runs = run_on_ranks(2, _runs, [*words, *more, f"run.dir={folder}"], join=False)
    assert runs == [[0], [0]]
    for line, wanted in zip(training_lines(folder), training_lines(straight / "run"), strict=True):
        assert line["keys_digest"] == wanted["keys_digest"]
        for figure in ("loss", "loss/l2_start", "loss/anchor", "loss/anchor_2"):
            assert line[figure] == pytest.approx(wanted[figure], rel=1e-3, abs=1e-9), figure
