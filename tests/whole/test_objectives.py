"""Named objectives through both engines, and what an objective remembers across a resume."""

import json
import shutil

import pytest

from mmscale.config.loss import OBJECTIVES
from tests.ranks.launch import run_on_ranks
from tests.whole.small_run import (
    ALONE,
    course,
    metrics,
    succeed,
    torchrun,
    training_lines,
    words_for,
    write_settings,
)

# Six updates are an epoch: clusters are made before the 7th, 13th and 19th.
REMEMBERING = [
    "loss.terms="
    + json.dumps(
        [
            {"kind": "infonce"},
            {
                "kind": "prototypes",
                "clusters": [4, 7],
                "weight": {"from": 0, "to": 0.5, "over": "1 epochs", "start": "1 epochs"},
            },
        ]
    ),
    'negatives.queue={size: 40, share: {from: 0.2, to: 1, over: "2 epochs"}}',
    'negatives.mining={kind: semi_hard, share: 0.2, strength: {from: 0, to: 1, over: "2 epochs"}}',
    "checkpoint.every=5 steps",
]

# Objectives that train more than towers and heads.
PARTS_OF_THEIR_OWN = ("vicreg_clip", "albef", "mixed")


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory):
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """An uninterrupted run. Read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    succeed([*ALONE, *settings, *REMEMBERING, f"run.dir={folder}"])
    return folder


def test_prototypes_begin_with_the_second_epoch_and_their_weight(straight):
    lines = {line["step"]: line for line in training_lines(straight)}
    # The weight of update 7 is still 0.
    assert ["loss/prototypes" in lines[step] for step in (6, 7, 8, 20)] == [
        False,
        False,
        True,
        True,
    ]
    assert lines[10]["loss/prototypes_weight"] == pytest.approx(0.25)
    assert lines[20]["loss/prototypes"] < lines[20]["loss/prototypes_chance"]


@pytest.mark.parametrize("step", [5, 15])
def test_a_run_goes_on_bit_for_bit_with_its_clusters_and_queue(settings, straight, tmp_path, step):
    folder = shutil.copytree(straight, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    succeed([*ALONE, *settings, *REMEMBERING, f"run.dir={folder}"])
    again, wanted = metrics(folder), metrics(straight)
    assert course(folder) == course(straight)
    assert {k: v for k, v in again[-1].items() if "second" not in k} == wanted[-1]


@pytest.mark.slow
def test_two_ranks_make_the_same_clusters(settings, straight, tmp_path):
    succeed([*torchrun(), *settings, *REMEMBERING, f"run.dir={tmp_path}"])
    wanted = {line["step"]: line for line in training_lines(straight)}
    for line in training_lines(tmp_path):
        for name in {"loss", "loss/infonce", "loss/prototypes"} & set(wanted[line["step"]]):
            assert line[name] == pytest.approx(wanted[line["step"]][name], rel=1e-3), name


def _train(names, settings, folder, kind):
    """Ten updates of each named objective, in this process; what each ended with."""
    from mmscale.train import main

    codes = {}
    for name in names:
        words = [
            *settings,
            f"loss.preset={name}",
            f"run.dir={folder / name}",
            f"engine.kind={kind}",
            "train.duration=10 steps",
            "checkpoint.every=null",
            "data.eval=null",
            "data.workers=0",
        ]
        if {"matching", "classification"} & {term["kind"] for term in OBJECTIVES[name]}:
            words += ["model.fusion.dim=32", "model.fusion.heads=2", "model.fusion.layers=1"]
        if any(term["kind"] == "classification" for term in OBJECTIVES[name]):
            words.append("model.fusion.classes=8")
        codes[name] = main(words)
    return codes


def assert_trained(folder, name):
    lines = training_lines(folder / name)
    assert len(lines) == 10
    assert {line["skipped"] for line in lines} == {0}
    assert {f"loss/{term['kind']}" for term in OBJECTIVES[name]} <= set().union(*lines)
    # Of these two the targets and pairs harden while the model learns.
    assert lines[-1]["loss"] < lines[0]["loss"] or name in ("albef", "mixed")


def test_every_named_objective_trains(settings, tmp_path):
    words = (list(OBJECTIVES), settings, tmp_path, "accelerate")
    (codes,) = run_on_ranks(1, _train, *words, join=False, timeout=600)
    assert codes == dict.fromkeys(OBJECTIVES, 0)
    for name in OBJECTIVES:
        assert_trained(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in PARTS_OF_THEIR_OWN else pytest.mark.soak
        )
        for name in OBJECTIVES
    ],
)
def test_every_named_objective_trains_with_deepspeed(settings, tmp_path, name):
    # A process each: DeepSpeed keeps the groups of a run that has ended.
    words = ([name], settings, tmp_path, "deepspeed")
    (codes,) = run_on_ranks(1, _train, *words, join=False)
    assert codes == {name: 0}
    assert_trained(tmp_path, name)
