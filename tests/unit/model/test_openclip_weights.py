"""`model.weights` of a whole OpenCLIP model: what is asked for is loaded, whatever its kind."""

import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from mmscale.config.model import ModelConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.build import build_model
from tests.unit.model.test_foreign import TEXT_CFG, VISION_CFG

OWN, MINE = 0.125, 0.75  # each weight of the model's folder, and of a file beside
KINDS = ["built_in", "folder", "hub"]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def name(kind, tmp_path, monkeypatch) -> Iterator[str]:
    """An OpenCLIP model by this kind of name; a folder's and the hub's bring weights."""
    content = {"embed_dim": 16, "vision_cfg": VISION_CFG, "text_cfg": TEXT_CFG}
    if kind == "built_in":
        file = tmp_path / "tiny-clip.json"
        file.write_text(json.dumps(content))
        open_clip.add_model_config(file)
        yield "openclip:tiny-clip"
        open_clip.factory._MODEL_CONFIG_PATHS.remove(file)
        del open_clip.factory._MODEL_CONFIGS["tiny-clip"]
        return
    folder = tmp_path / "folder"
    if kind == "hub":  # a local cache as the hub's client keeps it
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        page = tmp_path / "cache" / "models--who--clip"
        folder = page / "snapshots" / ("0" * 40)
        (page / "refs").mkdir(parents=True)
        (page / "refs" / "main").write_text("0" * 40)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": content, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    save_file(constant(OWN), folder / "open_clip_model.safetensors")
    yield "openclip:hf-hub:who/clip" if kind == "hub" else f"openclip:local-dir:{folder}"


def constant(value: float) -> dict[str, torch.Tensor]:
    """Weights of the tiny model, each of this value."""
    model = open_clip.model.CLIP(
        16, open_clip.CLIPVisionCfg(**VISION_CFG), open_clip.CLIPTextCfg(**TEXT_CFG)
    )
    return {n: torch.full_like(t, value) for n, t in model.state_dict().items()}


def built(name: str, weights: str):
    config = ModelConfig(preset=name, embed_dim=16, weights=weights)
    model, spec = build_model(config, None, 3)
    values = {
        n: float(p.detach().flatten()[0])
        for n, p in model.named_parameters()
        if n.startswith(("vision", "text"))
    }
    return values, spec, model


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_is_what_is_loaded(name, tmp_path, suffix):
    file = tmp_path / f"mine.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": constant(MINE)}, file)
    else:
        save_file(constant(MINE), file)
    values, _, model = built(name, str(file))
    assert set(values.values()) == {MINE}
    assert float(model.scale.log_scale.detach()) == MINE


def test_random_is_random_and_follows_the_seed(name):
    values, _, model = built(name, "random")
    assert OWN not in values.values()
    assert len(set(values.values())) > 5
    assert built(name, "random")[0] == values
    assert float(model.scale().detach()) == pytest.approx(1 / 0.07)


def test_pretrained_is_the_folders_own(name, kind):
    if kind == "built_in":
        with pytest.raises(ConfigError, match=r"model\.weights=pretrained is neither"):
            built(name, "pretrained")
        return
    values, spec, _ = built(name, "pretrained")
    assert set(values.values()) == {OWN}
    assert spec.mean == (0.5, 0.5, 0.5)


def test_what_is_no_weights_of_this_model_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.weights=laion.* is neither"):
        built(name, "laion2b")
    tensors = constant(MINE)
    dropped = tensors.pop("ln_final.weight")
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        built(name, str(tmp_path / "less.safetensors"))
    more = {**tensors, "ln_final.weight": dropped, "more": torch.zeros(2)}
    save_file(more, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        built(name, str(tmp_path / "more.safetensors"))


def test_a_folder_without_weights_has_no_pretrained_ones(name, kind):
    if kind != "folder":
        pytest.skip("only a folder can lack them here")
    (Path(name.removeprefix("openclip:local-dir:")) / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        built(name, "pretrained")
    assert built(name, "random")
