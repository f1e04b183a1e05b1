"""`model.weights` of a whole OpenCLIP model: what is asked for is loaded, whatever its kind."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from mmscale.checkpoint.export import preprocessing
from mmscale.config.model import ModelConfig
from mmscale.data.pixels import EvalTransform, normalise
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


def write_clip(folder: Path, preprocess: dict, **words) -> str:
    """A folder with a tiny model of drawn weights as OpenCLIP reads it, by its name."""
    content = {"embed_dim": 16, "vision_cfg": VISION_CFG, "text_cfg": TEXT_CFG, **words}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": content, "preprocess_cfg": {"size": 32, **preprocess}})
    )
    torch.manual_seed(0)
    vision, text = open_clip.CLIPVisionCfg(**VISION_CFG), open_clip.CLIPTextCfg(**TEXT_CFG)
    model = open_clip.model.CLIP(16, vision, text, **words)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def picture(height: int, width: int) -> np.ndarray:
    """Slopes with hard edges; no two of the ways to resize show the same of it."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], 2)
    edges = ((x // 17 + y // 23) % 2)[..., None]
    return np.where(edges, slopes, 255 - slopes).astype(np.uint8)


@pytest.mark.parametrize("shape", [(90, 150), (150, 90)])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_a_picture_goes_through_the_models_own_preprocessing(tmp_path, resize, shape):
    own = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": resize}
    name = write_clip(tmp_path / "clip", own)
    peer, _, transform = open_clip.create_model_and_transforms(name)
    model, spec = build_model(ModelConfig(preset=f"openclip:{name}", weights="pretrained"), None, 0)
    assert preprocessing(spec) == {**own, "size": 32, "mode": "RGB"}
    pixels = picture(*shape)
    theirs = transform(Image.fromarray(pixels))[None]
    square = EvalTransform(spec)(torch.from_numpy(pixels).permute(2, 0, 1))
    ours = normalise(square[None], spec)
    assert ((ours - theirs) * spec.std[0] * 255).abs().max() < 1.001
    with torch.no_grad():
        wanted = peer.eval().encode_image(theirs, normalize=True)
        got = model.eval()("both", ours, *caption(spec))[0].unit
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


def caption(spec) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor(spec.tokenize(["a red circle"]))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def test_pretrained_weights_bring_their_scale_and_bias(tmp_path):
    name = write_clip(tmp_path / "clip", {}, init_logit_scale=3.5, init_logit_bias=-7.25)
    words = {"preset": f"openclip:{name}", "embed_dim": 16, "logit_scale": {"bias": -10.0}}
    for weights, bias in (("pretrained", -7.25), ("random", -10.0)):
        model, _ = build_model(ModelConfig.model_validate({**words, "weights": weights}), None, 0)
        assert float(model.scale("bias").detach()) == bias
        assert (float(model.scale.log_scale.detach()) == 3.5) == (weights == "pretrained")
    plain, _ = build_model(ModelConfig(preset=f"openclip:{name}", weights="pretrained"), None, 0)
    assert plain.scale("bias") is None


def test_a_scale_is_cut_off_by_no_bound(tmp_path):
    name = write_clip(tmp_path / "clip", {}, init_logit_scale=4.75)
    words = {"preset": f"openclip:{name}", "weights": "pretrained", "logit_scale": {"max": 100}}
    with pytest.raises(ConfigError, match=r"scale of 115\.6, above model\.logit_scale\.max=100"):
        build_model(ModelConfig.model_validate(words), None, 0)
    for own, bound in (("auto", 115.58), (120, 120)):
        words["logit_scale"] = {"max": own}
        model, _ = build_model(ModelConfig.model_validate(words), None, 0)
        assert float(model.scale().detach()) == pytest.approx(115.58, abs=0.01)
        assert model.scale.limit() == pytest.approx(bound, abs=0.01)


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        ({"resize_mode": "longest", "fill_color": 128}, "fill_color=128"),
        ({"resize_mode": "tallest"}, "resize_mode=tallest is none of"),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(tmp_path, own, fault):
    name = write_clip(tmp_path / "clip", own)
    with pytest.raises(ConfigError, match=fault):
        build_model(ModelConfig(preset=f"openclip:{name}"), None, 0)


def test_a_decoder_that_is_left_out_is_told(tmp_path):
    decoder = {"multimodal_cfg": {"width": 32, "heads": 2, "layers": 1, "context_length": 16}}
    text = {**TEXT_CFG, "embed_cls": True, "output_tokens": True}
    vision = {**VISION_CFG, "attentional_pool": True, "output_tokens": True}
    content = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **decoder}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": content, "preprocess_cfg": {}})
    )
    model, _ = build_model(ModelConfig(preset=f"openclip:local-dir:{tmp_path}"), None, 0)
    assert "text decoder besides its towers" in str(model.text.left_out)
