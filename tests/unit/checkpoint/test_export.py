"""Exported files, loaded by the library that they are for, give the model's own embeddings."""

import json

import open_clip
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    VisionTextDualEncoderModel,
)

from mmscale.checkpoint.export import Exported, export
from mmscale.config.load import validate
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import DualEncoder, Tokenizer
from mmscale.model.presets import fill_preset
from tests.unit.model.tiny import CLIP_TEXT, save_bert

CAPTIONS = ["a red dog runs", "two cats on the large square sit", "a circle"]
TIMM = {"name": "timm:test_convnext", "weights": "random"}
CLIP_VISION = {
    "name": "openclip:ViT-B-32",
    "weights": "random",
    "options": {"width": 32, "layers": 2, "head_width": 16, "patch_size": 8},
}


@pytest.fixture
def bert(tmp_path):
    return {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random"}


def exported(out, model, image_size=32):
    config = validate({"data": {"train": "unused"}, "model": model})
    config = config.model_copy(update={"model": fill_preset(config.model)})
    built, spec = build_model(config.model, image_size, 0)
    with torch.no_grad():  # No tower or head is what it was initialised to.
        for parameter in built.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Exported(config, DualEncoder(built, spec.pad_token), spec, out)


def unit(rows):
    return torch.nn.functional.normalize(rows.detach(), dim=-1)


def assert_open_clip_agrees(what):
    name = f"local-dir:{what.out}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    pixels, _ = what.sample()
    ours = what.encoder.encode_image(pixels, normalize=True)
    torch.testing.assert_close(unit(model.encode_image(pixels)), ours, atol=1e-5, rtol=0)
    theirs = model.encode_text(tokenizer(CAPTIONS))
    ours = what.encoder.encode_text(Tokenizer(what.spec)(CAPTIONS), normalize=True)
    torch.testing.assert_close(unit(theirs), ours, atol=1e-5, rtol=0)
    scale = float(model.logit_scale.detach().exp())
    assert scale == pytest.approx(what.encoder.logit_scale(), rel=1e-6)
    normalise = transform.transforms[-1]
    assert tuple(normalise.mean) == what.spec.mean
    assert tuple(normalise.std) == what.spec.std


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_timm_and_hugging_face_towers_to_open_clip(tmp_path, bert, pooling):
    model = {"vision": TIMM, "text": bert | {"pooling": pooling}, "embed_dim": 24}
    what = exported(tmp_path / "out", model)
    export(what, "open_clip")
    assert_open_clip_agrees(what)


def test_openclip_towers_under_our_heads_to_open_clip(tmp_path):
    what = exported(tmp_path / "out", {"vision": CLIP_VISION, "text": CLIP_TEXT, "embed_dim": 16})
    export(what, "open_clip")
    assert_open_clip_agrees(what)


@pytest.fixture
def tiny_clip(tmp_path):
    """A small architecture among OpenCLIP's own."""
    folder = tmp_path / "configs"
    folder.mkdir()
    content = {
        "embed_dim": 16,
        "vision_cfg": CLIP_VISION["options"] | {"image_size": 32},
        "text_cfg": CLIP_TEXT["options"] | {"vocab_size": 49408},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)
    yield "tiny-clip"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    del open_clip.factory._MODEL_CONFIGS["tiny-clip"]


def test_a_whole_openclip_model_goes_back_under_its_own_name(tmp_path, tiny_clip):
    what = exported(tmp_path / "out", {"preset": f"openclip:{tiny_clip}"})
    export(what, "open_clip")
    assert_open_clip_agrees(what)
    weights = str(what.out / "open_clip_model.safetensors")
    model = open_clip.create_model(tiny_clip, pretrained=weights).eval()
    pixels, _ = what.sample()
    ours = what.encoder.encode_image(pixels)
    torch.testing.assert_close(model.encode_image(pixels), ours, atol=1e-5, rtol=0)


def test_openclip_weights_give_openclip_embeddings(tmp_path, tiny_clip):
    theirs = open_clip.create_model(tiny_clip).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    config = validate(
        {
            "data": {"train": "unused"},
            "model": {
                "preset": f"openclip:{tiny_clip}",
                "weights": str(tmp_path / "theirs.pt"),
            },
        }
    )
    built, spec = build_model(config.model, None, 0)
    ours = DualEncoder(built, spec.pad_token)
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        ours.encode_image(pixels), theirs.encode_image(pixels), atol=1e-5, rtol=0
    )
    tokens = open_clip.get_tokenizer(tiny_clip)(CAPTIONS)
    torch.testing.assert_close(
        ours.encode_text(Tokenizer(spec)(CAPTIONS)), theirs.encode_text(tokens), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"vision": TIMM | {"options": {"act_layer": "gelu"}}}, "options.act_layer"),
        ({"head": {"kind": "mlp"}}, "image head"),
        ({"head": {"bias": True}}, "text head"),
    ],
)
def test_what_open_clip_cannot_express_is_named(tmp_path, bert, model, named):
    what = exported(tmp_path / "out", {"vision": TIMM, "text": bert, "embed_dim": 16} | model)
    with torch.no_grad():
        for head in what.encoder.model.head.values():
            for parameter in head.parameters():
                parameter.add_(0.1)
    with pytest.raises(ConfigError, match=named):
        export(what, "open_clip")
    assert not what.out.exists()
    assert not list(tmp_path.glob(".*part"))


def hf_pair(folder):
    """CLIP's own towers: both give a pooled output."""
    folder.mkdir(exist_ok=True)
    vision = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    save_bert(folder / "text")
    text = CLIPTextConfig(
        vocab_size=22,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        eos_token_id=3,
        bos_token_id=2,
        pad_token_id=0,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    CLIPTextModel(text).save_pretrained(folder / "text")
    mean = {"mean": 0.5, "std": 0.5}
    return {
        "vision": {"name": f"hf:{folder / 'vision'}", "weights": "random", **mean},
        "text": {"name": f"hf:{folder / 'text'}", "weights": "random"},
        "embed_dim": 16,
    }


def test_hugging_face_towers_to_hugging_face(tmp_path):
    what = exported(tmp_path / "out", hf_pair(tmp_path))
    export(what, "hf")
    model = VisionTextDualEncoderModel.from_pretrained(what.out).eval()
    pixels, tokens = what.sample()
    mask = tokens != what.spec.pad_token
    output = model(input_ids=tokens, pixel_values=pixels, attention_mask=mask.long())
    ours = what.encoder.encode_image(pixels, normalize=True)
    torch.testing.assert_close(output.image_embeds, ours, atol=1e-5, rtol=0)
    ours = what.encoder.encode_text(tokens, normalize=True)
    torch.testing.assert_close(output.text_embeds, ours, atol=1e-5, rtol=0)


def test_what_hugging_face_cannot_express_is_named(tmp_path, bert):
    what = exported(tmp_path / "out", {"vision": TIMM, "text": bert, "embed_dim": 16})
    with pytest.raises(ConfigError, match=r"model\.vision\.name=timm:test_convnext"):
        export(what, "hf")
    pair = hf_pair(tmp_path / "pair") | {"text": bert}
    with pytest.raises(ConfigError, match=r"model\.text\.pooling=mean"):
        export(exported(tmp_path / "out", pair), "hf")


@pytest.mark.parametrize("towers", ["timm_hf", "openclip"])
def test_onnx_with_any_batch_and_length(tmp_path, bert, towers):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    pair = (
        {"vision": TIMM, "text": bert}
        if towers == "timm_hf"
        else {
            "vision": CLIP_VISION,
            "text": CLIP_TEXT,
        }
    )
    head = {"kind": "mlp", "bias": True}
    what = exported(tmp_path / "out", {**pair, "embed_dim": 16, "head": head})
    export(what, "onnx")
    image = onnxruntime.InferenceSession(what.out / "image.onnx")
    text = onnxruntime.InferenceSession(what.out / "text.onnx")
    pixels = torch.randn(5, 3, 32, 32)
    tokens = Tokenizer(what.spec)([*CAPTIONS, "the small green square under the red circle"])
    mask = tokens != what.spec.pad_token
    got = torch.from_numpy(image.run(None, {"pixels": pixels.numpy()})[0])
    ours = what.encoder.encode_image(pixels, normalize=True)
    torch.testing.assert_close(got, ours, atol=1e-5, rtol=0)
    fed = {"tokens": tokens.numpy(), "mask": mask.numpy()}
    got = torch.from_numpy(text.run(None, fed)[0])
    ours = what.encoder.encode_text(tokens, mask, normalize=True)
    torch.testing.assert_close(got, ours, atol=1e-5, rtol=0)


def test_a_folder_with_files_and_an_unknown_format_are_refused(tmp_path, bert):
    what = exported(tmp_path, {"vision": TIMM, "text": bert, "embed_dim": 16})
    with pytest.raises(ConfigError, match="holds files"):
        export(what, "onnx")
    with pytest.raises(ConfigError, match="open_clip, hf, onnx"):
        export(what, "tflite")
