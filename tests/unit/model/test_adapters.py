"""One interface for towers of every library: tokens, pooling, freezing, checkpointing, width."""

import json

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from mmscale.config.model import TextConfig, VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.tower import Pooling
from mmscale.model.towers import build_text, build_vision
from tests.unit.model.tiny import CLIP_TEXT, CONVNEXT, padded

CAPTIONS = ["a dog", "two red circle sits under the large green square", "the small cat runs"]
VIT = {
    "name": "timm:vit_tiny_patch16_224",
    "weights": "random",
    "options": {"depth": 3, "embed_dim": 24, "num_heads": 2, "drop_path_rate": 0.3},
}
OPENCLIP_VIT = {
    "name": "openclip:ViT-B-32",
    "weights": "random",
    "options": {"width": 48, "layers": 3, "head_width": 16, "patch_size": 16},
}
SWIN = {
    "name": "timm:swin_tiny_patch4_window7_224",
    "weights": "random",
    "options": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}
RESNET = {
    "name": "openclip:RN50",
    "weights": "random",
    "options": {"layers": [1, 1, 1, 1], "width": 8},
}


@pytest.fixture
def vision_folders(tmp_path):
    """Hugging Face image models with random weights, by family."""
    sizes = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    vit = ViTConfig(**sizes, intermediate_size=32, image_size=32, patch_size=16)
    dino = Dinov2Config(**sizes, image_size=28, patch_size=14)
    convnext = ConvNextConfig(hidden_sizes=[8, 20], depths=[1, 2], num_stages=2)
    models = {"vit": ViTModel(vit), "dino": Dinov2Model(dino), "convnext": ConvNextModel(convnext)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        facts = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(facts))
    return {name: {"name": f"hf:{tmp_path / name}"} for name in models}


def vision(settings, size=32, **more):
    torch.manual_seed(1)
    return build_vision(VisionConfig(**{**settings, **more}), size)[0]


def text(settings, **more):
    torch.manual_seed(1)
    tower, tokens = build_text(TextConfig(**{**settings, **more}))
    rows = tokens.tokenize(CAPTIONS)
    return tower, padded(rows, max(map(len, rows)), tokens.pad_token)


@pytest.mark.parametrize(
    ("settings", "tokens", "width"),
    [
        (VIT, 1 + 4, 24),
        (CONVNEXT, 1, 40),
        ({"name": "timm:mobilenetv3_small_050", "weights": "random"}, 1, 288),
        (OPENCLIP_VIT, 4, 48),
        (RESNET, 1, 256),
    ],
)
def test_image_towers_give_their_tokens_besides(settings, tokens, width):
    tower = vision(settings).eval()
    pooled, sequence = tower.forward_sequence(torch.randn(2, 3, 32, 32))
    assert sequence.shape == (2, tokens, width)
    assert pooled.shape == (2, tower.width)
    assert tower.sequence_width == width


def test_channels_last_maps_become_rows_of_places():
    tower = vision(SWIN, 64).eval()
    pooled, sequence = tower.forward_sequence(torch.randn(2, 3, 64, 64))
    assert sequence.shape == (2, 8 * 8, tower.sequence_width) == (2, 64, 24)
    torch.testing.assert_close(sequence.mean(1), pooled)


@pytest.mark.parametrize(("family", "tokens"), [("vit", 5), ("dino", 5), ("convnext", 16)])
def test_hugging_face_image_towers_give_their_tokens_besides(vision_folders, family, tokens):
    tower = vision(vision_folders[family], 28 if family == "dino" else 32).eval()
    size = 28 if family == "dino" else 32
    pooled, sequence = tower.forward_sequence(torch.randn(2, 3, size, size))
    assert (pooled.shape, sequence.shape) == ((2, 20), (2, tokens, 20))
    # A mask token is for pre-training: no image depends on it, and it would only decay.
    idle = {name for name, p in tower.named_parameters() if not p.requires_grad}
    assert idle == ({"trunk.embeddings.mask_token"} if family == "dino" else set())


@pytest.mark.parametrize(
    "settings", [VIT, CONVNEXT, {"name": "timm:mobilenetv3_small_050", "weights": "random"}]
)
def test_pooled_features_are_timms_own(settings):
    tower = vision(settings).eval()
    options = dict(settings.get("options", {}))
    if "vit" in settings["name"]:
        options["img_size"] = 32
    name = settings["name"].removeprefix("timm:")
    peer = timm.create_model(name, num_classes=0, **options).eval()
    peer.load_state_dict(tower.trunk.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(pixels), peer(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("hugging_face", [False, True])
def test_text_towers_give_a_vector_for_each_token(bert_folder, hugging_face):
    tower, (tokens, mask) = text({"name": f"hf:{bert_folder}"} if hugging_face else CLIP_TEXT)
    pooled, sequence = tower.eval().forward_sequence(tokens, mask)
    assert sequence.shape == (3, tokens.shape[1], tower.sequence_width)
    torch.testing.assert_close(tower(tokens, mask), pooled)
    if not hugging_face:  # pooled at the end token, which is each row's largest id
        torch.testing.assert_close(sequence[torch.arange(3), tokens.argmax(1)], pooled)


def test_rows_padded_for_openclip_are_cut_again():
    options = {**CLIP_TEXT["options"], "embed_cls": True}
    tower, (tokens, mask) = text({**CLIP_TEXT, "options": options})
    assert tower.whole_rows == 20
    assert tower.eval().forward_sequence(tokens, mask)[1].shape == (3, tokens.shape[1], 32)


def test_poolings_are_what_they_say():
    sequence = torch.randn(3, 5, 8, dtype=torch.float64)
    lengths = [5, 2, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rows = [row[:length] for row, length in zip(sequence, lengths, strict=True)]
    expected = {
        "cls": [row[0] for row in rows],
        "eos": [row[-1] for row in rows],
        "mean": [row.mean(0) for row in rows],
    }
    for kind, wanted in expected.items():
        torch.testing.assert_close(Pooling(kind, 8)(sequence, mask), torch.stack(wanted))
    torch.testing.assert_close(Pooling("mean", 8, prefix=2)(sequence), sequence[:, 2:].mean(1))
    torch.testing.assert_close(Pooling("eos", 8)(sequence), sequence[:, -1])


def test_attention_pooling_sees_real_tokens_only_and_is_siglips():
    torch.manual_seed(0)
    pool = Pooling("map", 128).double()
    siglip = AttentionPoolLatent(128, num_heads=2, norm_layer=torch.nn.LayerNorm).double()
    siglip.load_state_dict(pool.attention.state_dict())
    sequence = torch.randn(2, 6, 128, dtype=torch.float64)
    torch.testing.assert_close(pool(sequence), siglip(sequence))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    noisy = sequence.masked_fill(~mask[..., None], 1e3)
    torch.testing.assert_close(pool(noisy, mask)[0], siglip(sequence)[0])
    torch.testing.assert_close(pool(noisy, mask)[1:], siglip(sequence[1:, :4]))


@pytest.mark.parametrize("pooling", ["cls", "mean", "map"])
@pytest.mark.parametrize("family", ["timm", "vit", "dino"])
def test_image_poolings_train_every_parameter_that_counts(vision_folders, family, pooling):
    settings = VIT if family == "timm" else vision_folders[family]
    size = 28 if family == "dino" else 32
    tower = vision(settings, size, pooling=pooling).eval()
    pooled, sequence = tower.forward_sequence(torch.randn(2, 3, size, size))
    if pooling == "cls":
        torch.testing.assert_close(pooled, sequence[:, 0])
    if pooling == "mean":
        torch.testing.assert_close(pooled, sequence[:, 1:].mean(1))
    pooled.pow(3).sum().backward()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(name.startswith("pooling.") for name, _ in tower.named_parameters()) == (
        pooling == "map"
    )


def test_another_pooling_retires_the_towers_own():
    """SigLIP's own attention pooling gets no gradient under `mean`, and must not decay."""
    siglip = {
        "name": "timm:vit_base_patch16_siglip_224",
        "weights": "random",
        "options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    }
    assert all(p.requires_grad for p in vision(siglip).parameters())
    tower = vision(siglip, pooling="mean")
    idle = {name for name, p in tower.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in idle} == {"attn_pool"}


def test_a_pooling_that_the_tower_cannot_have_is_refused(vision_folders):
    for settings in (CONVNEXT, vision_folders["convnext"]):
        with pytest.raises(ConfigError, match=r"model\.vision\.pooling=cls.*no CLS token"):
            vision(settings, pooling="cls")
    with pytest.raises(ConfigError, match=r"model\.vision\.options\.pool_type"):
        vision(OPENCLIP_VIT, pooling="mean")
    with pytest.raises(ConfigError, match=r"model\.text\.options\.pool_type"):
        text(CLIP_TEXT, pooling="mean")


def test_a_learnt_pooling_needs_a_tower_that_learns(bert_folder):
    settings = {"name": f"hf:{bert_folder}", "pooling": "map"}
    with pytest.raises(ConfigError, match=r"model\.text\.pooling=map is learnt.*frozen=2"):
        text(settings, frozen=True)
    tower, inputs = text(settings, frozen=2)
    assert {name.split(".")[0] for name in gradients(tower, inputs)} == {"pool"}


@pytest.mark.parametrize("pooling", ["eos", "map"])
def test_text_poolings_ignore_padding(bert_folder, pooling):
    tower, (tokens, mask) = text({"name": f"hf:{bert_folder}"}, pooling=pooling)
    tower.eval()
    pooled = tower(tokens, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = tower(tokens[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], pooled[row], rtol=0, atol=1e-5)


def test_a_mask_that_is_not_looked_at_hides_the_same_padding(bert_folder):
    tower, (tokens, mask) = text({"name": f"hf:{bert_folder}"})
    tower.eval()
    assert not mask.all()
    ready = tower.ready(mask)
    assert ready.ndim == 4
    asked = tower.trunk(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    made = tower.trunk(input_ids=tokens, attention_mask=ready).last_hidden_state
    torch.testing.assert_close(made[mask], asked[mask], rtol=0, atol=1e-6)


def gradients(tower, inputs, seed=0):
    torch.manual_seed(seed)
    tower.zero_grad()
    tower.train()(*inputs).pow(3).sum().backward()
    return {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["timm", "convnext", "openclip", "hf vision", "hf", "clip text"])
def test_checkpointing_computes_again_and_gives_the_same_gradient(
    bert_folder, vision_folders, kind
):
    pixels = torch.randn(2, 3, 32, 32)
    images = {"timm": VIT, "convnext": CONVNEXT, "openclip": OPENCLIP_VIT}
    images["hf vision"] = vision_folders["vit"]
    both = []
    for checkpointing in (False, True):
        if kind in images:
            tower, inputs = vision(images[kind], checkpointing=checkpointing), (pixels,)
        else:
            settings = {"name": f"hf:{bert_folder}"} if kind == "hf" else CLIP_TEXT
            tower, inputs = text(settings, checkpointing=checkpointing)
        calls = []
        parameter = tower.block_parameters()[1][1]
        module = tower.trunk.get_submodule(parameter.rpartition(".")[0])
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        both.append((gradients(tower, inputs), len(calls)))
    (plain, once), (again, twice) = both
    assert (once, twice) == (1, 2)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_tower_without_checkpointing_says_so():
    with pytest.raises(ConfigError, match=r"model\.vision\.checkpointing=true.*openclip:RN50"):
        vision(RESNET, checkpointing=True)


@pytest.mark.parametrize(
    ("kind", "blocks", "trained_by_last"),
    [
        ("timm", 3, ("blocks.2", "norm")),
        ("openclip", 3, ("transformer.resblocks.2", "ln_post")),
        ("resnet", 4, ("layer4.0", "attnpool")),
        ("hf", 2, ("encoder.layer.1",)),
        ("clip text", 2, ("transformer.resblocks.1", "ln_final")),
        ("hf convnext", 2, ("encoder.stages.1", "layernorm")),
    ],
)
def test_blocks_freeze_from_the_input(bert_folder, vision_folders, kind, blocks, trained_by_last):
    images = {"timm": VIT, "openclip": OPENCLIP_VIT, "resnet": RESNET}
    images["hf convnext"] = vision_folders["convnext"]

    def build(frozen):
        if kind in images:
            return vision(images[kind], frozen=frozen), (torch.randn(2, 3, 32, 32),)
        settings = {"name": f"hf:{bert_folder}"} if kind == "hf" else CLIP_TEXT
        return text(settings, frozen=frozen)

    for frozen in (blocks - 1, -1):
        tower, inputs = build(frozen)
        names = {n.removeprefix("trunk.") for n in gradients(tower, inputs)}
        assert names
        assert all(name.startswith(trained_by_last) for name in names), names
        for name in trained_by_last:
            assert any(other.startswith(name) for other in names), name
    for wrong in (blocks + 1, -blocks - 1, 0):
        with pytest.raises(ConfigError, match=rf"frozen={wrong}.*{blocks} blocks"):
            build(wrong)
    tower, inputs = build(-blocks)
    before, *after = tower.block_parameters()
    assert len(after) == blocks
    more = {n.removeprefix("trunk.") for n in gradients(tower, inputs)}
    assert more == {name for block in after for name in block}
    assert before


def test_frozen_blocks_are_in_evaluation_mode_and_others_are_not(bert_folder):
    tower, _ = text({"name": f"hf:{bert_folder}"}, frozen=1)
    tower.train()
    encoder = tower.trunk.encoder.layer
    assert not any(module.training for module in encoder[0].modules())
    assert not tower.trunk.embeddings.dropout.training
    assert all(module.training for module in encoder[1].modules())
    assert not any(module.training for module in tower.eval().modules())


def test_parallel_lists_of_layers_are_one_chain_of_blocks(bert_folder):
    from transformers import FlaubertConfig

    sizes = {"emb_dim": 20, "n_layers": 3, "n_heads": 2, "vocab_size": 50}
    FlaubertConfig(**sizes, max_position_embeddings=32).save_pretrained(bert_folder)
    tower, _ = text({"name": f"hf:{bert_folder}", "weights": "random"}, frozen=2)
    trained = {name for name, p in tower.trunk.named_parameters() if p.requires_grad}
    lists = ("attentions.2.", "layer_norm1.2.", "layer_norm2.2.", "ffns.2.")
    assert trained
    assert all(name.startswith(lists) for name in trained), trained


def test_a_wrong_width_is_told_with_the_true_one(bert_folder):
    with pytest.raises(ConfigError, match=r"model\.vision\.width=1000, but timm:.* gives 24"):
        vision(VIT, width=1000)
    with pytest.raises(ConfigError, match=r"model\.text\.width=768, but hf:.* gives 24"):
        text({"name": f"hf:{bert_folder}"}, width=768)
    assert text({"name": f"hf:{bert_folder}"}, width=24)[0].width == 24
