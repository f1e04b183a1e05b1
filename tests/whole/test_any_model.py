"""`eval`, `embed` and `doctor` on any model: a run of no steps, an export, a stranger's folder."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import mmscale
import mmscale.cli.entry
from mmscale.cli.command import app
from mmscale.data.scenes import SHAPES
from mmscale.errors import ConfigError
from mmscale.train import main as train
from tests.ranks.launch import run_on_ranks
from tests.unit.model.test_openclip_weights import write_clip
from tests.unit.model.whole_hf import save_whole
from tests.whole.small_run import checkpoints


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder as OpenCLIP reads it, of other weights than a model begins with."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_clip(folder, {})
    weights = load_file(folder / "open_clip_model.safetensors")
    for name in ("visual.class_embedding", "visual.positional_embedding"):
        weights[name] *= 0
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def begun(clip, synthetic, tmp_path_factory):
    """A run of no steps that begins with the folder's weights."""
    folder = tmp_path_factory.mktemp("begun")
    settings = folder / "mine.yaml"
    settings.write_text(
        f"data: {{train: {synthetic.train}, eval: {synthetic.val}, workers: 0}}\n"
        f"model: {{preset: 'openclip:local-dir:{clip}', weights: pretrained}}\n"
        "train: {duration: 0 steps, global_batch_size: 16}\nlog: {page: false}\n",
        "utf-8",
    )
    assert run_on_ranks(1, train, [str(settings), f"run.dir={folder / 'run'}"], join=False) == [0]
    return folder / "run"


def verb(*words):
    return app([str(word) for word in words], standalone_mode=False)


def figures(tmp_path, model, *words):
    told = tmp_path / "told.json"
    assert not verb("eval", model, *words, "data.workers=0", "--json", told)
    return json.loads(told.read_text("utf-8"))


def test_one_model_is_the_same_by_every_name(clip, begun, synthetic, tmp_path):
    assert checkpoints(begun) == ["step-00000000"]
    own = figures(tmp_path, begun, "--data", synthetic.test)
    assert own.keys() >= {"i2t_r1", "t2i_r10", "images", "captions"}
    assert not verb("export", begun, "--to", "open_clip", "--out", tmp_path / "out")
    names = (
        begun / "checkpoints" / "step-00000000",
        clip,
        f"openclip:local-dir:{clip}",
        f"openclip:local-dir:{clip}@{clip / 'open_clip_model.safetensors'}",
        tmp_path / "out",
    )
    for name in names:
        assert figures(tmp_path, name, "--data", synthetic.test) == own, name
    stored = []
    for number, name in enumerate((begun, f"openclip:local-dir:{clip}")):
        npz = tmp_path / f"{number}.npz"
        assert not verb("embed", name, "--data", synthetic.val, "--out", npz, "data.workers=0")
        stored.append(np.load(npz))
    for key in ("image", "text", "image_ids", "text_ids"):
        np.testing.assert_array_equal(stored[0][key], stored[1][key])
    told = tmp_path / "doctor.json"
    for name in (clip, begun):
        code = verb("doctor", name, "--data", synthetic.val, "data.workers=0", "--json", told)
        assert code in (0, 3)
        assert json.loads(told.read_text("utf-8"))["verdict"]
    model, _, tokenizer = mmscale.load(clip)
    assert model.encode_text(tokenizer(["a star"])).shape == (1, 16)


def test_a_model_of_hugging_face(synthetic, tmp_path):
    save_whole(tmp_path / "siglip", "siglip")
    by_name = figures(tmp_path, f"hf:{tmp_path / 'siglip'}", "--data", synthetic.val)
    assert by_name == figures(tmp_path, tmp_path / "siglip", "--data", synthetic.val)
    assert by_name["images"] == 24


def test_a_file_of_sets_is_measured_as_each_alone(clip, begun, synthetic, tmp_path):
    names = tmp_path / "shapes.txt"
    names.write_text("\n".join(SHAPES), "utf-8")
    shapes = {"data": str(synthetic.val), "kind": "classes", "classes": str(names)}
    sets = {"pairs": {"data": str(synthetic.test)}, "shapes": shapes}
    file = tmp_path / "sets.json"
    file.write_text(json.dumps(sets), "utf-8")
    found = figures(tmp_path, clip, "--sets", file)
    assert found.keys() == {"pairs", "shapes"}
    alone = figures(tmp_path, clip, "--data", synthetic.test)
    assert found["pairs"] == alone | {"mean": found["pairs"]["mean"]}
    assert found["shapes"] == figures(tmp_path, clip, "--data", synthetic.val, "--classes", names)
    # A run's own sets are not looked at.
    assert figures(tmp_path, begun, "--sets", file) == found


def test_a_file_of_sets_is_embedded_and_diagnosed_set_by_set(begun, synthetic, tmp_path, capsys):
    names = tmp_path / "shapes.txt"
    names.write_text("\n".join(SHAPES), "utf-8")
    shapes = {"data": str(synthetic.val), "kind": "classes", "classes": str(names)}
    sets = {"a": {"data": str(synthetic.val)}, "shapes": shapes, "b": {"data": str(synthetic.test)}}
    file, told, out = tmp_path / "sets.json", tmp_path / "told.json", tmp_path / "out"
    file.write_text(json.dumps(sets), "utf-8")
    assert not verb("embed", begun, "--sets", file, "--out", out, "data.workers=0")
    assert sorted(path.name for path in out.iterdir()) == ["a.npz", "b.npz"]
    assert "shapes: is left out" in capsys.readouterr().err
    codes, verdicts = {}, {}
    codes["sets"] = verb("doctor", begun, "--sets", file, "data.workers=0", "--json", told)
    by_set = json.loads(told.read_text("utf-8"))
    assert list(by_set) == ["a", "b"]
    assert "b: verdict: " in capsys.readouterr().out
    for name in by_set:
        alone, data = tmp_path / "alone.npz", sets[name]["data"]
        assert not verb("embed", begun, "--data", data, "--out", alone, "data.workers=0")
        with np.load(out / f"{name}.npz") as ours, np.load(alone) as theirs:
            assert ours.files == theirs.files
            for key in ours.files:
                np.testing.assert_array_equal(ours[key], theirs[key])
        words = ["--data", data, "data.workers=0", "--json", told]
        codes[name] = verb("doctor", begun, *words)
        verdicts[name] = json.loads(told.read_text("utf-8"))
    assert by_set == verdicts
    assert codes["sets"] == max(codes["a"], codes["b"])


REFUSED = {
    "no pairs": (["eval", "{clip}"], "name the pairs with --data, or several sets with --sets"),
    "both": (["eval", "{clip}", "--data", "x", "--sets", "y"], "name the pairs with --data"),
    "no data": (["eval", "{clip}", "--sets", "y", "--classes", "imagenet"], "only with --data"),
    "nothing": (["eval", "{tmp}/none", "--data", "x"], "no such run or checkpoint; name a run"),
    "no weights": (["eval", "openclip:ViT-B-32", "--data", "x"], "openclip:ViT-B-32@WEIGHTS"),
    "not known": (["embed", "hf:{tmp}/none", "--data", "x", "--out", "{tmp}/o"], "none"),
    "no run": (["doctor", "openclip:local-dir:{clip}"], "is no run; name the pairs with --data"),
    "no set": (["eval", "{clip}", "--sets", "{tmp}/empty.yaml"], "names no set; write NAME"),
    "main": (["eval", "{clip}", "--sets", "{tmp}/main.yaml"], "without a set named main"),
    "embed": (["embed", "{clip}", "--out", "{tmp}/o"], "name the pairs with --data, or several"),
    "a file": (
        ["embed", "{clip}", "--sets", "y", "--out", "{tmp}/main.yaml"],
        "a folder is needed",
    ),
    "a folder": (["embed", "{clip}", "--data", "y", "--out", "{tmp}"], "a file is needed"),
    "of both": (["doctor", "{clip}", "--data", "x", "--sets", "y"], "leave --data out"),
    "an npz": (["doctor", "{tmp}/empty.yaml", "--sets", "y"], "holds embeddings"),
    "no pairs there": (["doctor", "{clip}", "--sets", "{tmp}/one.yaml"], "labelled images alone"),
    "twice": (["eval", "{clip}", "--sets", "{tmp}/twice.yaml"], "the key 'a' is given twice"),
}


@pytest.mark.parametrize(("words", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_looked_at_is_refused(clip, begun, tmp_path, words, told):
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "main.yaml").write_text("main: {data: x}\n")
    (tmp_path / "one.yaml").write_text("a: {data: x, kind: classes, classes: y}\n")
    (tmp_path / "twice.yaml").write_text("a: {data: x}\na: {data: y}\n")
    with pytest.raises(ConfigError) as caught:
        verb(*(word.format(clip=clip, tmp=tmp_path) for word in words))
    assert told in str(caught.value)
