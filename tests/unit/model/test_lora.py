"""Adapters in towers of every library: what is trained, how it begins, what merging gives."""

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmscale.config.load import load_config
from mmscale.config.model import TextConfig, VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.adapter_attention import AdaptedAttention
from mmscale.model.adapters import adapted, drop_adapter, merge_adapter
from mmscale.model.towers import build_text, build_vision
from tests.unit.model.test_adapters import OPENCLIP_VIT, SWIN, VIT
from tests.unit.model.tiny import CLIP_TEXT, CONVNEXT, save_bert

LORA = {"kind": "lora", "rank": 3, "alpha": 6}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
BEIT = {"name": "timm:beit_base_patch16_224", "weights": "random", "options": SMALL}
SIGLIP = {"name": "timm:vit_base_patch16_siglip_224", "weights": "random", "options": SMALL}


def vision(settings, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_vision(VisionConfig.model_validate(settings | more), None)[0].eval()


def text(settings, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_text(TextConfig.model_validate(settings | more))[0].eval()


def trained(tower):
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def spread(tower):
    """No adapter is what it was at the beginning, which adds nothing."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tower.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)


@pytest.fixture
def cases(tmp_path):
    """Build function, settings and a batch by name."""
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}"}
    tokens = torch.randint(1, 15, (2, 6))
    words = (tokens, torch.ones_like(tokens, dtype=torch.bool))
    pixels = (torch.randn(2, 3, 224, 224),)
    towers = {"vit": VIT, "openclip": OPENCLIP_VIT, "swin": SWIN, "siglip": SIGLIP, "beit": BEIT}
    found = {name: (vision, settings, pixels) for name, settings in towers.items()}
    found["clip text"] = text, CLIP_TEXT, words
    found["bert"] = text, bert, words
    return found


# Layers with an adapter: attention of torch's own counts twice, for its two projections.
LAYERS = {"vit": 12, "openclip": 12, "swin": 9, "siglip": 13, "beit": 6, "clip text": 8, "bert": 12}


@pytest.mark.parametrize("name", LAYERS)
def test_a_tower_begins_as_it_was_and_only_the_adapter_learns(cases, name):
    build, settings, row = cases[name]
    plain, tower = build(settings), build(settings, adapter=LORA)
    torch.testing.assert_close(tower(*row), plain(*row), atol=2e-6, rtol=0)
    layers = {n.rpartition(".lora_")[0] for n in trained(tower)}
    assert len(layers) == LAYERS[name]
    assert all(".lora_" in n for n in trained(tower))
    tower(*row).square().sum().backward()
    assert {n for n in trained(tower) if tower.get_parameter(n).grad is None} == set()
    below = {n.replace(".base_layer", "") for n in tower.state_dict() if ".lora_" not in n}
    assert below == set(plain.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_merged_it_gives_the_same_features(cases, name):
    build, settings, row = cases[name]
    plain, tower = build(settings), build(settings, adapter=LORA)
    spread(tower)
    wanted = tower(*row).detach()
    assert (wanted - plain(*row)).abs().max() > 1e-3
    merged = copy.deepcopy(tower)
    merge_adapter(merged)
    torch.testing.assert_close(merged(*row), wanted, atol=1e-5, rtol=0)
    assert set(merged.state_dict()) == set(plain.state_dict())
    assert not adapted(merged)
    drop_adapter(tower)
    for tensor, value in plain.state_dict().items():
        assert torch.equal(tower.state_dict()[tensor], value), tensor


@pytest.mark.parametrize(("frozen", "kept"), [(1, [0]), (-1, [0, 1])])
def test_blocks_that_are_not_kept_are_trained_themselves(frozen, kept):
    tower = vision(VIT, adapter=LORA, frozen=frozen)
    names = trained(tower)
    for block in range(3):
        own = {n for n in names if f"blocks.{block}." in n}
        assert own
        assert all((".lora_" in n) == (block in kept) for n in own)
    assert "trunk.norm.weight" in names
    assert "trunk.patch_embed.proj.weight" not in names
    # Dropout before the adapter acts in training, though its block is kept.
    tower = vision(VIT, adapter=LORA | {"dropout": 0.5}, frozen=frozen).train()
    assert tower.get_submodule("trunk.blocks.0.attn.qkv.lora_dropout").training


def test_a_pooling_of_ours_is_trained_besides(tmp_path):
    tower = vision(VIT, adapter=LORA, pooling="map")
    assert {n.partition(".")[0] for n in trained(tower)} == {"trunk", "pooling"}
    assert all(".lora_" in n for n in trained(tower) if n.startswith("trunk."))


def test_named_layers_and_no_others():
    tower = vision(VIT, adapter=LORA | {"targets": ["qkv", "blocks.2.mlp.fc1"]})
    layers = {n.partition(".lora_")[0] for n in trained(tower)}
    qkv = {f"trunk.blocks.{block}.attn.qkv" for block in range(3)}
    assert layers == {*qkv, "trunk.blocks.2.mlp.fc1"}
    convolutions = vision(CONVNEXT, adapter=LORA | {"targets": ["fc1"]})
    assert len(trained(convolutions)) == 2 * 4
    assert all(".mlp.fc1.lora_" in n for n in trained(convolutions))
    spread(convolutions)
    row = torch.randn(2, 3, 64, 64)
    wanted = convolutions(row)
    merge_adapter(convolutions)
    torch.testing.assert_close(convolutions(row), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "adapter", "named"),
    [
        (VIT, {"targets": ["query"]}, r"targets holds 'query'.*fc1, fc2, proj, qkv"),
        (CONVNEXT, {}, r"targets=auto finds no linear layer"),
        (CONVNEXT, {"targets": ["conv_dw"]}, r"targets holds 'conv_dw'"),
        (BEIT, {"targets": ["qkv"]}, r"do not pass through blocks\.0\.attn\.qkv"),
    ],
)
def test_what_no_adapter_can_serve_is_refused(settings, adapter, named):
    with pytest.raises(ConfigError, match=named):
        vision(settings, adapter=LORA | adapter)


def test_without_peft_it_is_said_how_to_install_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "mmscale.model.adapters.find_spec", lambda name: None if name == "peft" else found(name)
    )
    vision(VIT)
    with pytest.raises(ConfigError, match=r"pip install 'mmscale\[adapters\]'"):
        vision(VIT, adapter=LORA)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "hidden", "each row's"])
def test_attention_computes_what_torchs_own_does_with_the_sum_as_weights(batch_first, mask):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({nn.MultiheadAttention: AdaptedAttention})
    trunk = nn.Sequential(copy.deepcopy(theirs))
    ours = inject_adapter_in_model(config, trunk)[0]
    out = ours.base_layer.out_proj
    theirs.in_proj_weight.data += 2 * ours.lora_B.default.weight @ ours.lora_A.default.weight
    theirs.out_proj.weight.data += 2 * out.lora_B.default.weight @ out.lora_A.default.weight
    rows, others = torch.randn(5, 6, 16), torch.randn(5, 7, 16)
    if not batch_first:
        rows, others = rows.transpose(0, 1), others.transpose(0, 1)
    words = {
        "none": {},
        "causal": {"attn_mask": torch.full((6, 6), float("-inf")).triu(1)},
        "hidden": {"key_padding_mask": torch.arange(6).expand(5, 6) > 3},
        "each row's": {"attn_mask": torch.rand(20, 6, 6) > 0.7},
    }[mask]
    if mask == "each row's":
        words["attn_mask"][:, :, 0] = False
    for need_weights in (True, False):
        words["need_weights"] = need_weights
        got, wanted = ours(rows, rows, rows, **words), theirs(rows, rows, rows, **words)
        torch.testing.assert_close(got[0], wanted[0], atol=2e-6, rtol=0)
        if need_weights:
            torch.testing.assert_close(got[1], wanted[1], atol=2e-6, rtol=0)
    got, wanted = ours(rows, others, others), theirs(rows, others, others)
    torch.testing.assert_close(got[0], wanted[0], atol=2e-6, rtol=0)


def test_kept_weights_of_attention_stay_the_same_parameters_bit_for_bit():
    tower = vision(OPENCLIP_VIT, adapter=LORA)
    spread(tower)
    kept = [p for n, p in tower.named_parameters() if "in_proj_weight" in n]
    before = [p.detach().clone() for p in kept]
    for _ in range(3):
        tower(torch.randn(1, 3, 224, 224))
        tower.state_dict()
    now = [p for n, p in tower.named_parameters() if "in_proj_weight" in n]
    assert all(a is b for a, b in zip(now, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.vision.adapter.kind=lora", "model.vision.frozen=true"], "adapter.kind='lora' has"),
        (["model.text.adapter.rank=4"], r"model\.text\.adapter\.rank=4 has an effect only with an"),
        (["model.text.adapter={kind: lora, targets: []}"], "targets"),
        (["model.text.adapter={kind: lora, rank: 0}"], "rank"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(words, named):
    with pytest.raises(ConfigError, match=named):
        load_config(["demo", "data.train=shards", *words])
