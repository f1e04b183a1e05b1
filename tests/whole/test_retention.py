"""`retain`: a run beside its own start, and the best point between its first and last weights."""

import json
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.files import Checkpoint
from mmscale.cli import app
from mmscale.evaluation.trained import load_trained
from tests.whole.command import ROOT, run
from tests.whole.small_run import ALONE, deepspeed, metrics, succeed, write_settings

SETS = "eval.sets={old: {data: %s}}"
RETAIN = ["retain.sets=[old]", "retain.budget=3", "eval.every=5 steps", "checkpoint.keep=1"]
LAST = 10


def _words(folder: Path, pairs) -> list[str | Path]:
    data = [f"data.train={pairs.train}", f"data.eval={pairs.val}", SETS % pairs.test]
    return [write_settings(folder), *data, f"train.duration={LAST} steps", *RETAIN]


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory) -> Path:
    """A run with a budget; the folder of settings is its parent."""
    folder = tmp_path_factory.mktemp("retained")
    words = [*_words(folder, synthetic), "checkpoint.every=5 steps"]
    succeed([*ALONE, *words, f"run.dir={folder}/run"])
    return folder / "run"


def _line(run_dir: Path) -> dict:
    return json.loads((run_dir / "retention.json").read_text())


def test_a_run_stands_beside_its_own_start_and_keeps_its_first_checkpoint(trained):
    lines = {line["step"]: line for line in metrics(trained) if "retain/lost" in line}
    assert list(lines) == [0, 5, 10]
    begun = lines[0]
    assert begun["retain/gain"] == begun["retain/lost"] == begun["retain/old/lost"] == 0
    for name in ("cka_image", "cka_text", "neighbours"):
        assert begun[f"retain/old/{name}"] == pytest.approx(1)
        assert lines[LAST][f"retain/old/{name}"] < 1
    for line in lines.values():
        gain = line["eval/mean"] - begun["eval/mean"]
        lost = begun["eval/old/mean"] - line["eval/old/mean"]
        assert (line["retain/gain"], line["retain/lost"]) == pytest.approx((gain, lost))
    # `keep` is 1.
    steps = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert steps == ["step-00000000", f"step-{LAST:08d}"]


def test_the_best_point_within_the_budget_is_what_verbs_take(trained, synthetic, tmp_path):
    line = _line(trained)
    points = {point["share"]: point for point in line["points"]}
    assert len(points) == 11
    assert (points[0.0]["gain"], points[0.0]["lost"]) == (0, 0)
    ends = {line["step"]: line for line in metrics(trained) if "retain/lost" in line}
    assert points[1.0]["gain"] == pytest.approx(ends[LAST]["retain/gain"])
    assert points[1.0]["lost"] == pytest.approx(ends[LAST]["retain/lost"])
    within = [point for point in line["points"] if point["lost"] <= 3]
    best = max(within, key=lambda point: point["gain"])
    assert line["chosen"] == best["share"]
    shares = f"{1 - best['share']},{best['share']}"
    both = [trained / "checkpoints" / f"step-{step:08d}" for step in (0, LAST)]
    words = ["blend", *map(str, both), "--weights", shares, "--out", str(tmp_path / "same")]
    assert app(words, standalone_mode=False) == 0
    ours, same = Checkpoint(trained / "best"), Checkpoint(tmp_path / "same")
    assert ours.tensors.keys() == same.tensors.keys()
    assert all(
        torch.equal(ours.read("value", name), same.read("value", name)) for name in ours.tensors
    )
    assert load_trained(trained).checkpoint.folder == trained / "best"


@pytest.mark.slow
def test_a_run_that_went_on_has_the_same_line(trained, synthetic, tmp_path):
    words = [*_words(trained.parent, synthetic), "checkpoint.every=5 steps"]
    half = [word for word in words if not str(word).startswith("train.duration")]
    succeed([*ALONE, *half, "train.duration=5 steps", f"run.dir={tmp_path}/run"])
    # Its first end has chosen a blend, which is none of the longer run's.
    assert load_trained(tmp_path / "run").checkpoint.folder == tmp_path / "run/best"
    succeed([*ALONE, *words, f"run.dir={tmp_path}/run"])
    assert _line(tmp_path / "run") == _line(trained)


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_folder_takes_its_start_along(trained, synthetic, tmp_path):
    words = [*_words(trained.parent, synthetic), "checkpoint.every=5 steps"]
    half = [word for word in words if not str(word).startswith("train.duration")]
    succeed([*ALONE, *half, "train.duration=5 steps", f"run.dir={tmp_path}/run"])
    middle = f"run.resume={tmp_path}/run/checkpoints/step-00000005"
    succeed([*ALONE, *words, middle, f"run.dir={tmp_path}/other"])
    assert _line(tmp_path / "other") == _line(trained)


@pytest.mark.slow
def test_the_guard_halts_where_too_much_stays_lost(synthetic, tmp_path):
    # From a start that knows the retained set by heart, for which that set must be trained first.
    old = [f"data.train={synthetic.test}", "train.duration=60 steps", "optim.lr=3e-3"]
    settings = write_settings(tmp_path)
    succeed([*ALONE, settings, *old, f"run.dir={tmp_path}/old"])
    data = [f"data.train={synthetic.train}", f"data.eval={synthetic.val}", SETS % synthetic.test]
    words = ["retain.sets=[old]", "eval.every=5 steps", "guard.action=halt", "guard.patience=2"]
    words += ["guard.verdicts=[forgetting]"]
    words += [f"model.weights={tmp_path}/old", "train.duration=40 steps", "optim.lr=1e-2"]
    done = run([*ALONE, settings, *data, *words, f"run.dir={tmp_path}/run"])
    assert done.returncode == 3, done.stderr
    assert "forgetting in 2 evaluations in a row" in done.stderr
    lost = [line["retain/lost"] for line in metrics(tmp_path / "run") if "retain/lost" in line]
    assert lost[0] == 0
    assert min(lost[-2:]) > 2
    assert not all(points > 2 for points in lost[-3:-2])


@pytest.mark.slow
def test_the_line_of_a_run_under_zero_3_is_that_of_one_process(synthetic, tmp_path):
    zero = f"engine.deepspeed={ROOT}/ds_configs/zero3.json"
    succeed([*deepspeed(), *_words(tmp_path, synthetic), zero, f"run.dir={tmp_path}/run"])
    line, found = _line(tmp_path / "run"), tmp_path / "points.json"
    both = [str(tmp_path / "run/checkpoints" / f"step-{step:08d}") for step in (0, LAST)]
    words = ["--sweep", "--out", str(tmp_path / "swept"), "--json", str(found)]
    assert app(["blend", *both, *words], standalone_mode=False) == 0
    for ours, alone in zip(line["points"], json.loads(found.read_text())["points"], strict=True):
        assert alone["shares"][1] == ours["share"]
        assert ours["figures"]["eval/mean"] == pytest.approx(alone["mean"], abs=1e-9)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["retain.sets=[new]"], "retain.sets=new is none of eval.sets"),
        (["retain.budget=2"], "retain.budget"),
        (["retain.sets=[old]", "retain.metric=eval/gone/mean", "retain.budget=1"], "gone"),
        (["retain.sets=[old]", "retain.budget=-1"], "retain.budget"),
        (["retain.sets=[old]", "retain.metric=eval/r1", "retain.budget=1"], "measures eval/i2t_r1"),
    ],
)
def test_what_retains_nothing_is_refused(synthetic, tmp_path, words, told):
    data = [f"data.train={synthetic.train}", f"data.eval={synthetic.val}", SETS % synthetic.test]
    done = run([*ALONE, write_settings(tmp_path), *data, *words, f"run.dir={tmp_path}/run"])
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
