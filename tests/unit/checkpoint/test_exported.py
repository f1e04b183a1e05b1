"""Models that begin with the weights of an export, whatever its format."""

import json
import shutil

import pytest
import torch

from mmscale.checkpoint.export import export
from mmscale.checkpoint.exported import export_at
from mmscale.checkpoint.files import BOUND, HEADS
from mmscale.checkpoint.resume import first_weights
from mmscale.config.model import ModelConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.build import build_model
from mmscale.model.presets import fill_preset
from tests.unit.checkpoint.test_export import CLIP_VISION, TIMM, exported, hf_pair, tiny_clip
from tests.unit.model.tiny import CLIP_TEXT, save_bert
from tests.unit.model.whole_hf import save_whole

assert tiny_clip, "a fixture"


def model_of(tmp_path, kind, tiny="tiny-clip"):
    if kind == "openclip":
        return {"vision": CLIP_VISION, "text": CLIP_TEXT, "embed_dim": 16}
    if kind == "hf":
        return hf_pair(tmp_path / "pair")
    if kind == "preset_openclip":
        return {"preset": f"openclip:{tiny}"}
    if kind.startswith("preset_"):
        name = kind.removeprefix("preset_")
        save_whole(tmp_path / name, name)
        return {"preset": f"hf:{tmp_path / name}"}
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random", "pooling": "mean"}
    return {"vision": TIMM, "text": bert, "embed_dim": 24, "head": {"bias": kind == "bias"}}


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("timm", "open_clip"),
        ("openclip", "open_clip"),
        ("preset_openclip", "open_clip"),
        ("hf", "hf"),
        ("preset_clip", "clip"),
        ("preset_siglip", "clip"),
        ("timm", "sentence_transformers"),
        ("bias", "sentence_transformers"),
        ("hf", "sentence_transformers"),
    ],
)
def test_an_export_gives_back_every_tensor(tmp_path, tiny_clip, kind, to):
    if to == "sentence_transformers":
        pytest.importorskip("sentence_transformers", reason="the extra is not installed")
    what = exported(tmp_path / "out", model_of(tmp_path, kind, tiny_clip))
    kept = {name: tensor.clone() for name, tensor in what.encoder.model.state_dict().items()}
    export(what, to)
    config = what.config.model
    fresh, _ = build_model(config, 32, seed=7, fill=False)
    begun = fresh.state_dict()
    moved = shutil.move(what.out, tmp_path / "moved")
    source = first_weights(config.model_copy(update={"weights": str(moved)}))
    source.load_weights(fresh, (BOUND,))
    assert list(begun) == list(kept)
    for name, tensor in fresh.state_dict().items():
        wanted = kept[name]
        if name == "scale.log_scale" and to == "sentence_transformers":
            wanted = begun[name]  # the format has none
        torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-6, msg=name)


def test_heads_of_another_width_are_drawn_if_that_is_asked_for(tmp_path):
    model = model_of(tmp_path, "timm")
    what = exported(tmp_path / "out", model)
    export(what, "open_clip")
    other, _ = build_model(
        fill_preset(ModelConfig.model_validate({**model, "embed_dim": 8})), 32, 7
    )
    drawn = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    source = export_at(what.out)
    with pytest.raises(CheckpointError) as caught:
        source.load_weights(other)
    assert "2 tensors differ (head.image.layers.0.weight is [24," in str(caught.value)
    assert "or set model.head.weights=random" in str(caught.value)
    source.load_weights(other, (HEADS,))
    theirs = what.encoder.model.state_dict()
    for name, tensor in other.state_dict().items():
        wanted = drawn[name] if name.startswith("head.") else theirs[name]
        assert torch.equal(tensor, wanted), name


def test_another_architecture_is_named_by_its_first_tensor(tmp_path):
    what = exported(tmp_path / "out", model_of(tmp_path, "timm"))
    export(what, "open_clip")
    other, _ = build_model(
        ModelConfig.model_validate(model_of(tmp_path, "openclip") | {"embed_dim": 24}), 32, 7
    )
    with pytest.raises(CheckpointError) as caught:
        export_at(what.out).load_weights(other)
    first = next(iter(other.state_dict()))
    assert f"tensors differ ({first} is missing there;" in str(caught.value)
    assert "model.head.weights" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        (("image.onnx", "mmscale.json"), ConfigError, "ONNX graphs, which keep no tensors"),
        (("trained.safetensors",), ConfigError, "adapters without the towers below them"),
        (("config.json",), CheckpointError, "neither a checkpoint nor a run"),
        ((), CheckpointError, "neither a checkpoint nor a run"),
    ],
)
def test_a_folder_that_gives_no_weights_is_refused(tmp_path, files, error, says):
    for file in files:
        (tmp_path / file).write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(error, match=says):
        first_weights(ModelConfig(weights=str(tmp_path)))


def test_a_name_that_is_no_folder_is_refused_for_two_towers():
    with pytest.raises(ConfigError, match=r"model\.weights=runs/typo: no such folder"):
        first_weights(ModelConfig(weights="runs/typo"))
    assert first_weights(ModelConfig(weights="random")) is None
    assert first_weights(ModelConfig(preset="hf:a/b", weights="pretrained")) is None
