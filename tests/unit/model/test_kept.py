"""A checkpoint keeps of its towers what building them again needs, and nothing else."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import BertConfig, ViTConfig, ViTImageProcessor, ViTModel

from mmscale.config.model import ModelConfig
from mmscale.errors import ConfigError
from mmscale.model import hub
from mmscale.model.build import build_model
from mmscale.model.kept import kept_towers, opened_lines, tower_files
from mmscale.model.presets import fill_preset
from tests.unit.model.test_conventions import TINY
from tests.unit.model.test_foreign import TEXT_CFG, VISION_CFG, change, save_openclip
from tests.unit.model.test_openclip_weights import constant
from tests.unit.model.tiny import CLIP_TEXT, CONVNEXT, save_bert

CAPTIONS = ["a red dog runs", "two cats", ""]


def save_vit(folder: Path) -> Path:
    vit = ViTConfig(image_size=32, patch_size=8, intermediate_size=16, **TINY)
    ViTModel(vit).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_timm(folder: Path) -> Path:
    folder.mkdir()
    facts = {"input_size": [3, 32, 32], "mean": [0.25] * 3, "std": [0.5] * 3, "num_classes": 0}
    facts["interpolation"] = "bilinear"
    options = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 40]}
    change(
        folder / "config.json",
        architecture="convnext_atto",
        pretrained_cfg=facts,
        model_args=options,
    )
    return folder


def save_clip_with_tokenizer(folder: Path) -> Path:
    save_openclip(folder, {**TEXT_CFG, "vocab_size": 22, "hf_tokenizer_name": "x"})
    save_bert(folder / "bert")
    shutil.copy(folder / "bert" / "vocab.txt", folder)
    BertConfig(vocab_size=22).save_pretrained(folder)
    shutil.rmtree(folder / "bert")
    return folder


def save_clip_over_bert(folder: Path) -> Path:
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": "x", "context_length": 16}
    save_bert(folder)
    (folder / "model.safetensors").unlink()
    return save_openclip(folder, {**text, "hf_pooler_type": "mean_pooler"})


MODELS = {
    "hugging_face": lambda folder: {
        "vision": {"name": f"hf:{save_vit(folder / 'vit')}"},
        "text": {"name": f"hf:{save_bert(folder / 'bert')}", "options": {"hidden_act": "relu"}},
    },
    "timm_folder": lambda folder: {
        "vision": {"name": f"timm:local-dir:{save_timm(folder / 'timm')}", "weights": "random"},
        "text": CLIP_TEXT,
    },
    "openclip_towers": lambda folder: {
        "vision": {
            "name": f"openclip:local-dir:{save_openclip(folder / 'a')}",
            "weights": "random",
        },
        "text": {
            "name": f"openclip:local-dir:{save_clip_with_tokenizer(folder / 'b')}",
            "weights": "random",
            "options": {"context_length": 9},
        },
    },
    "whole_openclip": lambda folder: {
        "preset": f"openclip:local-dir:{save_clip_with_tokenizer(folder / 'clip')}",
    },
    "whole_openclip_over_bert": lambda folder: {
        "preset": f"openclip:local-dir:{save_clip_over_bert(folder / 'clip')}",
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_built_again_from_what_is_kept_of_it(tmp_path, monkeypatch, kind):
    lying = tmp_path / "lying"
    lying.mkdir()
    config = fill_preset(ModelConfig.model_validate({**MODELS[kind](lying), "embed_dim": 16}))
    for folder in lying.rglob("*"):  # neither weights nor code are to be kept
        if folder.is_dir():
            (folder / "code.py").write_text("raise SystemExit\n")
            torch.save({}, folder / "weights.bin")
    model, spec = build_model(config, None, 0)
    files = tower_files(config)
    assert files
    assert not [name for name in files if name.endswith((".py", ".bin", ".safetensors", ".pt"))]
    shutil.rmtree(lying)
    for name, content in files.items():
        (tmp_path / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kept" / name).write_bytes(content)
    kept = kept_towers(config, config, tmp_path / "kept", files)
    monkeypatch.chdir("/")
    with hub.fetching_only(()):
        again, spec_again = build_model(kept, None, 7, fill=False)
    again.load_state_dict(model.state_dict())
    assert spec_again.tokenize(CAPTIONS) == spec.tokenize(CAPTIONS)
    for name in ("image_size", "mean", "std", "interpolation", "pad_token", "context_length"):
        assert getattr(spec_again, name) == getattr(spec, name)
    pixels = torch.rand(2, 3, spec.image_size, spec.image_size)
    tokens = torch.tensor([row[:3] for row in spec.tokenize(["a red dog runs", "two cats on a"])])
    inputs = pixels, tokens, torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        for before, now in zip(
            model.eval()("both", *inputs)[:2], again.eval()("both", *inputs)[:2], strict=True
        ):
            assert torch.equal(before.unit, now.unit)
    assert tower_files(kept).keys() == files.keys()
    assert opened_lines(config, config, kept) == []


def test_what_libraries_bring_is_not_kept():
    config = ModelConfig.model_validate({"vision": CONVNEXT, "text": CLIP_TEXT, "embed_dim": 16})
    assert tower_files(config) == {}
    assert kept_towers(config, config, Path("nowhere"), []) == config
    assert opened_lines(config, config, config) == []


def test_a_tower_that_the_user_names_is_not_the_kept_one(tmp_path):
    def naming(text: str) -> ModelConfig:
        return ModelConfig.model_validate({"vision": CONVNEXT, "text": {"name": text}})

    stored, files = naming("hf:who/model"), {"text/config.json"}
    kept = kept_towers(stored, stored, tmp_path, files)
    assert kept.text.name == f"hf:{tmp_path / 'text'}"
    mine = naming("hf:/my/model")
    assert kept_towers(mine, stored, tmp_path, files) == mine
    assert opened_lines(mine, stored, mine) == []
    assert [line.split(" is ")[0] for line in opened_lines(stored, stored, stored)] == [
        "model.text.name=hf:who/model"
    ]


def test_nothing_is_fetched_for_the_words_of_a_checkpoint(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    config = ModelConfig.model_validate(
        {"vision": CONVNEXT, "text": {"name": "hf:who/no-such-model"}}
    )
    with hub.fetching_only(()), pytest.raises(ConfigError, match="nothing is fetched"):
        build_model(config, 32, 0, fill=False)


def test_pixels_of_a_tag_are_those_of_its_weights_without_them_too(tmp_path):
    # The tag's normalisation is another than the architecture's.
    config = ModelConfig(preset="openclip:ViT-B-32", weights="laion400m_e31", embed_dim=512)
    facts = dict(open_clip.get_pretrained_cfg("ViT-B-32", "laion400m_e31"))
    other = {**facts, "mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    tags = open_clip.pretrained._PRETRAINED["ViT-B-32"]
    tags["laion400m_e31"] = other
    try:
        _, spec = build_model(config, None, 0, fill=False)
    finally:
        tags["laion400m_e31"] = facts
    assert spec.mean == (0.5, 0.5, 0.5)
    assert spec.interpolation == "bilinear"


def test_pixels_of_a_tag_are_kept_beside_a_tokenizer_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    page = tmp_path / "cache" / "models--timm--ViT-B-16-SigLIP"
    (page / "refs").mkdir(parents=True)
    (page / "refs" / "main").write_text("0" * 40)
    (page / "snapshots").mkdir()
    save_bert(page / "snapshots" / ("0" * 40))
    config = ModelConfig(preset="openclip:ViT-B-16-SigLIP", weights="webli", embed_dim=768)
    content = json.loads(tower_files(config)["vision/open_clip_config.json"])
    assert content["preprocess_cfg"] == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def test_the_weights_of_an_openclip_folder_are_not_needed_again(tmp_path):
    folder = save_openclip(tmp_path / "clip")
    save_file(constant(0.5), folder / "open_clip_model.safetensors")
    config = ModelConfig(preset=f"openclip:local-dir:{folder}", weights="pretrained", embed_dim=16)
    build_model(config, None, 0)
    files = tower_files(config)
    assert list(files) == ["vision/open_clip_config.json"]
    assert (
        json.loads(files["vision/open_clip_config.json"])["model_cfg"]["vision_cfg"] == VISION_CFG
    )
    (folder / "open_clip_model.safetensors").unlink()
    build_model(config, None, 0, fill=False)


def test_a_model_that_cannot_be_had_is_told_as_where_it_is_built(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    for part, other in (("vision", {"text": CLIP_TEXT}), ("text", {"vision": CONVNEXT})):
        name = {part: {"name": "hf:who/no-such-model"}}
        config = ModelConfig.model_validate({**other, **name, "embed_dim": 16})
        told = []
        for action in (tower_files, lambda config: build_model(config, 32, 0)):
            with pytest.raises(ConfigError) as caught:
                action(config)
            told.append(str(caught.value))
        assert told[0] == told[1]
        assert told[0].startswith(f"model.{part}.name=hf:who/no-such-model could not be loaded")
