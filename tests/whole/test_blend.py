"""`mmscale blend`: the mean of trained models, in a checkpoint that every verb takes."""

import json
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.files import Checkpoint
from mmscale.cli import app
from mmscale.data.scenes import SHAPES
from mmscale.errors import MmscaleError
from mmscale.evaluation.blend import open_all
from tests.whole.command import run
from tests.whole.small_run import ALONE, SETTINGS, metrics, succeed, write_settings

TEXT = "options: {width: 64, layers: 1, heads: 2, context_length: 32}"


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory) -> Path:
    """A folder with `first` and `last`, checkpoints of one run; `other`, which is wider."""
    folder = tmp_path_factory.mktemp("made")
    assert TEXT in SETTINGS
    (folder / "wider.yaml").write_text(SETTINGS.replace(TEXT, TEXT.replace("64", "32")))
    data = [f"data.train={synthetic.train}", f"data.eval={synthetic.val}"]
    succeed([*ALONE, write_settings(folder), *data, f"run.dir={folder}/runs/run"])
    succeed(
        [
            *ALONE,
            folder / "wider.yaml",
            *data,
            f"run.dir={folder}/runs/wider",
            "train.duration=0 steps",
        ]
    )
    for name, place in {"first": "run", "last": "run", "wider": "wider"}.items():
        step = {"first": 10, "last": 20, "wider": 0}[name]
        (folder / name).symlink_to(folder / f"runs/{place}/checkpoints/step-{step:08d}")
    return folder


def _verb(*words) -> None:
    assert app([str(word) for word in words], standalone_mode=False) == 0


def _weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path.resolve())
    return {name: checkpoint.read("value", name) for name in checkpoint.tensors}


def test_the_line_has_both_models_at_its_ends_and_the_mean_in_its_middle(made):
    first, last = (_weights(made / name) for name in ("first", "last"))
    for name, weights in {"at0": "1,0", "at1": "0,1", "middle": None}.items():
        words = ["--weights", weights] if weights else []
        _verb("blend", made / "first", made / "last", "--out", made / name, *words)
    for name, wanted in {"at0": first, "at1": last}.items():
        found = _weights(made / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    middle = _weights(made / "middle")
    for name, value in first.items():
        if value.is_floating_point():
            mean = (value.double() / 2 + last[name].double() / 2).float()
            assert torch.equal(middle[name], mean)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_a_sweep_keeps_the_best_of_eleven_points_and_every_verb_takes_it(made, synthetic):
    out, found = made / "best", made / "points.json"
    words = ["--sweep", "--out", out, "--json", found]
    _verb("blend", made / "first", made / "last", *words)
    told = json.loads(found.read_text())
    assert [point["shares"][1] for point in told["points"]] == pytest.approx(
        [share / 10 for share in range(11)]
    )
    best = max(told["points"], key=lambda point: point["mean"])
    assert told["shares"] == best["shares"]
    again = made / "eval.json"
    _verb("eval", out, "--data", synthetic.val, "--json", again)
    figures = json.loads(again.read_text())
    assert figures == {name: best[name] for name in figures}
    # The point that is the run's last checkpoint has what the run measured at its end.
    measured = next(line for line in reversed(metrics(made / "runs/run")) if "eval/mean" in line)
    assert told["points"][-1]["mean"] == pytest.approx(measured["eval/mean"], abs=1e-9)
    _verb("embed", out, "--data", synthetic.val, "--out", made / "pairs.npz")
    warm = [f"data.train={synthetic.train}", f"model.weights={out}", "train.duration=1 steps"]
    succeed([*ALONE, made / "small.yaml", *warm, f"run.dir={made}/warm"])


def _sets(folder: Path, pairs) -> Path:
    """A file of two sets: pairs, and labelled images."""
    (folder / "shapes.txt").write_text("\n".join(SHAPES), "utf-8")
    shapes = {"data": str(pairs.val), "kind": "classes", "classes": f"{folder}/shapes.txt"}
    file = folder / "sets.json"
    file.write_text(json.dumps({"old": {"data": str(pairs.test)}, "shapes": shapes}), "utf-8")
    return file


@pytest.mark.parametrize(
    ("metric", "budget"),
    [("eval/mean", 1.0), pytest.param("eval/old/t2i_r10", 0.0, marks=pytest.mark.slow)],
)
def test_a_sweep_within_a_budget_gains_most_of_the_points_that_lose_no_more(
    made, synthetic, tmp_path, metric, budget
):
    told = tmp_path / "points.json"
    words = ["--sets", _sets(tmp_path, synthetic), "--metric", metric, "--budget", budget]
    both = made / "first", made / "last"
    _verb("blend", *both, "--sweep", *words, "--out", tmp_path / "best", "--json", told)
    found = json.loads(told.read_text())
    judged = {"main": "mean", "old": "old/mean", "shapes": "shapes/top1"}
    gained = metric.removeprefix("eval/")
    judged.pop("main" if gained == "mean" else "old")
    assert set(found["sets"]) == set(judged)
    points = found["points"]
    for point in points:
        assert point["gain"] == pytest.approx(point[gained] - points[0][gained])
        lost = max(points[0][key] - point[key] for key in judged.values())
        assert point["lost"] == pytest.approx(lost)
    within = [point for point in points if point["lost"] <= budget]
    best = max(within, key=lambda point: point["gain"])
    assert found["shares"] == best["shares"]
    # What was written has the figures of the point.
    figures = tmp_path / "figures.json"
    _verb("eval", tmp_path / "best", "--sets", tmp_path / "sets.json", "--json", figures)
    for name, of_set in json.loads(figures.read_text()).items():
        assert of_set == {key: best[f"{name}/{key}"] for key in of_set}


@pytest.mark.slow
def test_a_sweep_takes_the_sets_of_the_first_run(made, synthetic, tmp_path):
    run_dir, told = tmp_path / "run", tmp_path / "points.json"
    data = [f"data.train={synthetic.train}", f"eval.sets={{old: {{data: {synthetic.test}}}}}"]
    words = [*data, f"model.weights={made}/first", "train.duration=1 steps", f"run.dir={run_dir}"]
    succeed([*ALONE, made / "small.yaml", *words])
    both = run_dir, made / "last"
    words = ["--sweep", "--data", synthetic.val, "--json", told]
    _verb("blend", *both, *words, "--budget", "100", "--out", tmp_path / "all")
    found = json.loads(told.read_text())
    assert found["sets"] == ["old"]
    assert {"old/mean", "mean"} < found["points"][0].keys()
    _verb("blend", *both, *words, "--out", tmp_path / "one")
    alone = json.loads(told.read_text())
    # A budget that nothing exceeds chooses what is chosen without; other sets are not looked at.
    assert (alone["sets"], alone["shares"]) == ([], found["shares"])
    assert not any("old" in key for key in alone["points"][0])


def test_a_run_does_not_go_on_from_a_blend(made, synthetic):
    out = made / "mean"
    _verb("blend", made / "first", made / "last", "--out", out)
    words = [f"data.train={synthetic.train}", f"data.eval={synthetic.val}", f"run.dir={made}/on"]
    done = run([*ALONE, made / "small.yaml", *words, f"run.resume={out}"])
    assert done.returncode == 2
    assert f"model.weights={out}" in done.stderr


@pytest.mark.slow
def test_adapters_are_merged_before_a_mean_is_taken(made, synthetic):
    words = ["model.text.adapter.kind=lora", "optim.lr=1e-2", "train.duration=4 steps"]
    words += [f"data.train={synthetic.train}", f"run.dir={made}/lora", "checkpoint.every=2 steps"]
    succeed([*ALONE, made / "small.yaml", *words])
    ends = [made / "lora/checkpoints" / f"step-{step:08d}" for step in (2, 4)]
    _verb("blend", *ends, "--weights", "0.25,0.75", "--out", made / "merged")
    (found,) = open_all([made / "merged"])
    assert not any("lora" in name for name in found.weights)
    first, last = open_all(ends)
    kept = [name for name in _weights(ends[0]) if name.endswith(".base_layer.weight")]
    for name in kept:
        plain = name.replace(".base_layer.", ".")
        mean = first.weights[plain] / 4 + last.weights[plain] * 3 / 4
        assert torch.allclose(found.weights[plain], mean, atol=1e-7)
        # The layer below the adapter did not move; what is blended did.
        assert torch.equal(*(_weights(end)[name] for end in ends))
        assert not torch.equal(first.weights[plain], last.weights[plain])
    assert kept


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["first", "wider"], 5, "of another architecture"),
        (["first", "missing"], 2, "missing: no such run or checkpoint"),
        (["first", "last", "--weights", "1,1"], 2, "they sum to 1"),
        (["first", "last", "--weights", "one"], 2, "is no list of numbers"),
        (["first", "last", "--weights", "1.5,-0.5"], 2, "a share of 0 or more"),
        (["first", "last", "wider", "--sweep"], 2, "3 are named"),
        (["first", "last", "--sweep", "--weights", "1,0"], 2, "without --weights"),
        (["first", "last", "--out", "runs"], 2, "holds something already"),
        (["first", "last", "--budget", "1"], 2, "--budget: has an effect only with --sweep"),
        (["first", "last", "--sweep", "--budget", "1"], 2, "no set beside that of eval/mean"),
        (["first", "last", "--sweep", "--budget", "inf"], 2, "no number of points"),
        (["first", "last", "--sweep", "--metric", "eval/coco/mean"], 2, "evaluation set coco"),
        (["first", "last", "--sweep", "--metric", "eval/r1"], 2, "the evaluation measures"),
        (["first", "last", "--sweep", "--sets", "none.yaml"], 2, "none.yaml"),
    ],
)
def test_what_cannot_be_blended_is_refused(made, words, code, told, monkeypatch):
    monkeypatch.chdir(made)
    words = words if "--out" in words else [*words, "--out", "none"]
    with pytest.raises(MmscaleError, match=told) as refused:
        _verb("blend", *words)
    assert refused.value.exit_code == code
    assert not Path("none").exists()


def test_the_first_tensor_that_differs_is_named(made):
    done = run(["mmscale", "blend", "first", "wider", "--out", "none"], cwd=made)
    assert done.returncode == 5
    here, there = _weights(made / "first"), _weights(made / "wider")
    name = next(name for name in here if here[name].shape != there[name].shape)
    shapes = f"{name} is {list(there[name].shape)} there, {list(here[name].shape)} here"
    assert shapes in done.stderr
