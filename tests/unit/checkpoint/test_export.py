"""Exported files, loaded by the library that they are for, give the model's own embeddings."""

import copy
import json
import os
import shutil
import subprocess
import sys

import open_clip
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    VisionTextDualEncoderModel,
)

from mmscale.checkpoint.export import Exported, export, require_exportable
from mmscale.config.load import validate
from mmscale.errors import ConfigError
from mmscale.model.adapters import drop_adapter
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


LORA = {"adapter": {"kind": "lora", "rank": 2, "alpha": 4}}


def with_adapters(folder, bert, towers):
    pairs = {
        "openclip": {"vision": CLIP_VISION | LORA, "text": CLIP_TEXT | LORA},
        "timm_hf": {"vision": TIMM_VIT, "text": bert | LORA | {"frozen": -1}},
        "hf": {k: v | LORA if k != "embed_dim" else v for k, v in hf_pair(folder).items()},
    }
    return {"embed_dim": 16, **pairs[towers]}


TIMM_VIT = {"name": "timm:test_vit", "weights": "random", **LORA}


@pytest.mark.parametrize(
    ("to", "towers"), [("open_clip", "openclip"), ("open_clip", "timm_hf"), ("hf", "hf")]
)
def test_adapters_are_merged_into_what_is_exported(tmp_path, bert, to, towers):
    what = exported(tmp_path / "out", with_adapters(tmp_path / "pair", bert, towers), None)
    assert any(".lora_" in name for name in what.encoder.model.state_dict())
    pixels, tokens = what.sample()
    wanted = what.encoder(pixels, tokens)
    export(what, to)
    for ours, merged in zip(wanted, what.encoder(pixels, tokens), strict=True):
        torch.testing.assert_close(merged, ours, atol=1e-5, rtol=0)
    if to == "open_clip":
        assert_open_clip_agrees(what)


@pytest.mark.parametrize("towers", ["hf", "timm_hf"])
def test_adapters_as_folders_that_peft_loads_onto_the_towers_below(tmp_path, bert, towers):
    model = with_adapters(tmp_path / "pair", bert, towers)
    what = exported(tmp_path / "out", model, None)
    # The towers as anybody has them: before an adapter, by their own libraries.
    below = copy.deepcopy(what.encoder.model)
    for part in ("vision", "text"):
        drop_adapter(below.get_submodule(part))
    export(what, "adapter")
    pixels, tokens = what.sample()
    rows = {"vision": (pixels,), "text": (tokens, tokens != what.spec.pad_token)}
    for part, row in rows.items():
        tower = below.get_submodule(part)
        before = tower(*row)
        peft.PeftModel.from_pretrained(tower.trunk, what.out / part)
        wanted = what.encoder.model.get_submodule(part)(*row)
        torch.testing.assert_close(tower(*row), wanted, atol=1e-5, rtol=0)
        assert (before - wanted).abs().max() > 1e-3
    others = load_file(what.out / "trained.safetensors")
    trained = {n for n, p in what.encoder.model.named_parameters() if p.requires_grad}
    assert set(others) == {name for name in trained if ".lora_" not in name}
    assert ("text.trunk.encoder.layer.1.output.dense.weight" in others) == (towers == "timm_hf")


def test_an_adapter_that_peft_would_read_as_another_is_refused(tmp_path, bert):
    what = exported(tmp_path / "out", with_adapters(tmp_path / "pair", bert, "openclip"), None)
    layer = peft.tuners.lora.layer.MultiheadAttention(
        torch.nn.MultiheadAttention(8, 2),
        "default",
        peft.LoraConfig(init_lora_weights=False),
        r=8,
        lora_alpha=8,
    )
    before = layer.base_layer.out_proj.base_layer.weight.clone()
    layer.merge()
    out = layer.base_layer.out_proj
    added = out.base_layer.weight - before
    if torch.allclose(added, out.get_delta_weight("default"), atol=1e-6):
        export(what, "adapter")
        return
    with pytest.raises(ConfigError, match=r"adds the adapter of.*twice; export to open_clip"):
        export(what, "adapter")


def test_a_model_without_adapters_has_none_to_export(tmp_path, bert):
    what = exported(tmp_path / "out", {"vision": TIMM, "text": bert, "embed_dim": 16})
    with pytest.raises(ConfigError, match="no adapter was trained; export to open_clip"):
        export(what, "adapter")


def test_a_folder_with_files_and_an_unknown_format_are_refused(tmp_path, bert):
    what = exported(tmp_path, {"vision": TIMM, "text": bert, "embed_dim": 16})
    with pytest.raises(ConfigError, match="holds files"):
        export(what, "onnx")
    with pytest.raises(ConfigError, match="open_clip, hf, onnx, sentence_transformers, adapter"):
        export(what, "tflite")


OPEN_CLIP_TEXT = """
import json, re, sys
from pathlib import Path

import open_clip, torch

out, given = map(Path, sys.argv[1:])
words, got = json.loads((given / "words.json").read_text()), torch.load(given / "inputs.pt")
if (out / "README.md").exists():
    [code] = re.findall("```python\\n(.*?)```", (out / "README.md").read_text(), re.S)
    exec(code.replace("PATH OF THIS FOLDER", str(out)))
else:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
with torch.no_grad():
    rows = model.eval().encode_image(got), model.encode_text(tokenizer(words))
torch.save(rows, given / "rows.pt")
"""
HF_TEXT = """
import json, sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, VisionTextDualEncoderModel

out, given = map(Path, sys.argv[1:])
words, got = json.loads((given / "words.json").read_text()), torch.load(given / "inputs.pt")
model = VisionTextDualEncoderModel.from_pretrained(out).eval()
fed = AutoTokenizer.from_pretrained(out)(words, padding=True, return_tensors="pt")
with torch.no_grad():
    found = model(fed["input_ids"], got, fed["attention_mask"])
torch.save((found.image_embeds, found.text_embeds), given / "rows.pt")
"""
ONNX_TEXT = """
import json, sys
from pathlib import Path

import onnxruntime, torch
from transformers import AutoTokenizer

out, given = map(Path, sys.argv[1:])
words, got = json.loads((given / "words.json").read_text()), torch.load(given / "inputs.pt")
facts = json.loads((out / "mmscale.json").read_text())
fed = AutoTokenizer.from_pretrained(out / facts["tokenizer"])(
    words, padding=True, return_tensors="np"
)
image = onnxruntime.InferenceSession(out / "image.onnx").run(None, {"pixels": got.numpy()})
text = onnxruntime.InferenceSession(out / "text.onnx").run(
    None, {"tokens": fed["input_ids"], "mask": fed["attention_mask"].astype(bool)}
)
torch.save((torch.from_numpy(image[0]), torch.from_numpy(text[0])), given / "rows.pt")
"""


def clip_over_bert(tmp_path):
    """A whole OpenCLIP model with a text tower of Hugging Face's, in a folder."""
    folder = save_bert(tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": "x", "context_length": 16}
    vision = CLIP_VISION["options"] | {"image_size": 32}
    content = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": content, "preprocess_cfg": {}})
    )
    return {"preset": f"openclip:local-dir:{folder}"}


@pytest.mark.parametrize(
    ("to", "towers", "code"),
    [
        ("open_clip", "openclip", OPEN_CLIP_TEXT),
        ("open_clip", "timm_hf", OPEN_CLIP_TEXT),
        ("open_clip", "whole_over_bert", OPEN_CLIP_TEXT),
        ("hf", "hf", HF_TEXT),
        pytest.param("onnx", "timm_hf", ONNX_TEXT, marks=pytest.mark.slow),
    ],
)
def test_an_export_can_be_moved(tmp_path, bert, to, towers, code):
    if to == "onnx":
        pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    kinds = {
        "openclip": lambda: {"vision": CLIP_VISION, "text": CLIP_TEXT, "embed_dim": 16},
        "timm_hf": lambda: {"vision": TIMM, "text": bert, "embed_dim": 16},
        "whole_over_bert": lambda: clip_over_bert(tmp_path),
        "hf": lambda: hf_pair(tmp_path / "pair"),
    }
    here, there = tmp_path / "here", tmp_path / "far" / "away" / "there"
    pair = kinds[towers]()
    what = exported(here, pair)
    export(what, to)
    there.parent.mkdir(parents=True)
    here.rename(there)
    for folder in ("bert", "clip", "pair"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    (tmp_path / "words.json").write_text(json.dumps(CAPTIONS))
    pixels, _ = what.sample()
    torch.save(pixels, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", code, there, tmp_path],
        cwd="/",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    image, text = torch.load(tmp_path / "rows.pt")
    ours = what.encoder.encode_image(pixels, normalize=True)
    torch.testing.assert_close(unit(image), ours, atol=1e-5, rtol=0)
    ours = what.encoder.encode_text(Tokenizer(what.spec)(CAPTIONS), normalize=True)
    torch.testing.assert_close(unit(text), ours, atol=1e-5, rtol=0)
    assert str(tmp_path / "bert") not in "".join(f.read_text() for f in there.glob("*.json"))


def test_a_moved_open_clip_export_is_a_model_of_ours_again(tmp_path, bert):
    what = exported(tmp_path / "here", {"vision": TIMM, "text": bert, "embed_dim": 16})
    export(what, "open_clip")
    moved = (tmp_path / "here").rename(tmp_path / "there")
    shutil.rmtree(tmp_path / "bert")
    model = {"preset": f"openclip:local-dir:{moved}", "weights": "pretrained"}
    config = fill_preset(validate({"data": {"train": "unused"}, "model": model}).model)
    built, spec = build_model(config, None, 0)
    ours = DualEncoder(built, spec.pad_token)
    pixels, _ = what.sample()
    torch.testing.assert_close(
        ours.encode_image(pixels, True), what.encoder.encode_image(pixels, True), atol=1e-5, rtol=0
    )
    rows = (Tokenizer(s)(CAPTIONS) for s in (spec, what.spec))
    encoders = zip((ours, what.encoder), rows, strict=True)
    texts = (encoder.encode_text(tokens, normalize=True) for encoder, tokens in encoders)
    torch.testing.assert_close(*texts, atol=1e-5, rtol=0)


SENTENCE = "sentence_transformers"


@pytest.mark.parametrize(
    ("model", "refusing"),
    [
        ({"vision": TIMM | {"options": {"pad_type": "same"}}}, {"open_clip", "hf"}),
        ({"vision": TIMM}, {"hf"}),
        ({"vision": TIMM, "head": {"kind": "mlp"}}, {"open_clip", "hf", SENTENCE}),
        ({"vision": TIMM, "head": {"unit_rms": True}}, {"open_clip", "hf", SENTENCE}),
        ({"vision": TIMM, "head": {"standardize": 8}}, {"open_clip", "hf"}),
        ({"vision": TIMM, "head": {"image": {"bias": True}}}, {"hf"}),
        ({"vision": TIMM, "text": {"pooling": "eos"}}, {"open_clip", "hf"}),
        ({"vision": {"name": "hf:nowhere"}}, {"open_clip"}),
        ({"vision": {"name": "hf:nowhere"}, "text": {"pooling": "mean"}}, {"open_clip", "hf"}),
        ({"vision": TIMM | {"pooling": "map"}}, {"open_clip", "hf", SENTENCE}),
    ],
)
def test_a_refusal_comes_from_the_configuration_and_names_only_what_does_not_refuse(
    tmp_path, model, refusing
):
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    text = {"name": "hf:nowhere"} | model.pop("text", {})
    config = validate({"data": {"train": "unused"}, "model": {"text": text, **model}})
    for to in ("open_clip", "hf"):
        if to not in refusing:
            require_exportable(config, to, tmp_path / "out")
            continue
        with pytest.raises(ConfigError) as caught:
            require_exportable(config, to, tmp_path / "out")
        others = {"open_clip", "hf", "onnx", SENTENCE} - refusing
        reason, _, advised = str(caught.value).rpartition("; export to ")
        assert reason
        assert set(advised.split(" or ")) == others
