import open_clip
import pytest
import torch
import torch.nn.functional as F

from mmscale.config.model import ModelConfig
from mmscale.contracts import COMPONENTS
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.build import build_model
from mmscale.model.presets import fill_preset
from mmscale.model.two_tower import component_of, no_decay
from tests.unit.model.tiny import CONVNEXT, model_config, padded

CAPTIONS = ["a red circle", "two dogs run over the green field", "a cat", "the blue square"]
MOBILENET = {"name": "timm:mobilenetv3_small_050", "weights": "random"}


def batch(spec, size=32):
    rows = spec.tokenize(CAPTIONS)
    tokens, mask = padded(rows, max(map(len, rows)), spec.pad_token)
    return torch.randn(len(rows), 3, size, size), tokens, mask


def contrast(image, text, scale):
    logits = scale * image.unit @ text.unit.T
    rows = torch.arange(len(logits))
    return F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)


def test_modes_agree_and_rows_are_unit():
    model, spec = build_model(model_config(), 32, seed=0)
    pixels, tokens, mask = batch(spec)
    image, text, scale, _ = model("both", pixels, tokens, mask)
    raw_image, raw_text = model("image", pixels), model("text", tokens, mask)
    again = model("heads", raw_image, raw_text)
    assert image.raw.shape == (4, model.vision.width) == (4, 40)
    assert text.raw.shape == (4, model.text.width) == (4, 32)
    assert torch.equal(again[0].unit, image.unit)
    assert torch.equal(again[1].unit, text.unit)
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(image.unit.norm(dim=1), torch.ones(4))
    assert spec.context_length == 20


def test_float64_stays_float64_and_bfloat16_is_normalised_wider():
    model, spec = build_model(model_config(), 32, seed=0)
    pixels, tokens, mask = batch(spec)
    image, text, scale, _ = model.double()("both", pixels.double(), tokens, mask)
    assert {image.unit.dtype, text.unit.dtype, scale.dtype} == {torch.float64}
    image, text, scale, _ = model.bfloat16()("both", pixels.bfloat16(), tokens, mask)
    assert image.projected.dtype == torch.bfloat16
    assert {image.unit.dtype, text.unit.dtype, scale.dtype} == {torch.float32}


@pytest.mark.parametrize("hugging_face", [False, True])
def test_every_trainable_parameter_gets_a_gradient(bert_folder, hugging_face):
    text = {"text": {"name": f"hf:{bert_folder}"}} if hugging_face else {}
    model, spec = build_model(model_config(**text), 32, seed=0)
    contrast(*model("both", *batch(spec))[:3]).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert component_of(name) in COMPONENTS
        assert param.ndim > 0, name
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_frozen_towers_have_no_gradient_and_stay_in_evaluation_mode(bert_folder):
    config = model_config(
        vision={**MOBILENET, "frozen": True}, text={"name": f"hf:{bert_folder}", "frozen": True}
    )
    model, spec = build_model(config, 32, seed=0)
    model.train()
    inputs = batch(spec)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = model("both", *inputs), model("both", *inputs)
    assert torch.equal(first[1].raw, second[1].raw), "dropout of a frozen tower is on"
    contrast(*first[:3]).backward()
    trained = {name for name, param in model.named_parameters() if param.grad is not None}
    assert {component_of(name) for name in trained} == {"head", "scale"}
    assert not first[0].raw.requires_grad
    assert not any(module.training for module in model.vision.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_trained_towers_keep_batch_norm_statistics_and_train_its_weights():
    model, spec = build_model(model_config(vision=MOBILENET), 32, seed=0)
    model.train()
    assert model.vision.training
    before = {name: buffer.clone() for name, buffer in model.vision.named_buffers()}
    contrast(*model("both", *batch(spec))[:3]).backward()
    for name, buffer in model.vision.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.vision.trunk.bn1.weight.grad is not None


def test_a_seed_is_a_model():
    noise = torch.get_rng_state()
    first, second, other = (build_model(model_config(), 32, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(noise, torch.get_rng_state()), "building draws from the caller's generator"
    pairs = zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True)
    differing = 0
    for (name, one), same, different in pairs:
        assert torch.equal(one, same), name
        differing += not torch.equal(one, different)
    assert differing > 10


def test_one_part_does_not_change_the_start_of_another():
    deeper = {**CONVNEXT, "options": {"depths": [1, 2, 1, 1], "dims": [8, 16, 24, 40]}}
    first, _ = build_model(model_config(), 32, seed=0)
    second, _ = build_model(model_config(vision=deeper), 32, seed=0)
    for one, other in ((first.text, second.text), (first.head, second.head)):
        assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_decay_spares_vectors_and_the_scale():
    model, _ = build_model(model_config(), 32, seed=0)
    for name, param in model.named_parameters():
        spared = no_decay(name, param)
        assert spared == (param.ndim == 1 or name.startswith("scale."))
    assert component_of("head.image.layers.0.weight") == "head"


def test_explicit_settings_win_over_a_preset():
    config = fill_preset(ModelConfig.model_validate({"preset": "medium", "vision": CONVNEXT}))
    assert config.vision.name == CONVNEXT["name"]
    assert config.text.name == "hf:flaubert/flaubert_small_cased"
    assert config.embed_dim == 512
    assert fill_preset(ModelConfig(preset="large")).embed_dim == 768
    assert fill_preset(ModelConfig(preset="large", embed_dim=64)).embed_dim == 64
    whole = ModelConfig.model_validate(fill_preset(ModelConfig(preset="large")).model_dump())
    assert fill_preset(whole) == whole
    with pytest.raises(ConfigError, match="small, medium, medium-mobilebert, large"):
        fill_preset(ModelConfig(preset="huge"))
    with pytest.raises(ConfigError, match=r"model\.vision\.name is not set"):
        build_model(ModelConfig(), None, seed=0)


def test_an_openclip_preset_is_the_openclip_model(tmp_path):
    peer = open_clip.create_model("ViT-S-32-alt", pretrained=None, force_image_size=64).eval()
    path = tmp_path / "weights.pt"
    torch.save(peer.state_dict(), path)
    config = ModelConfig(preset="openclip:ViT-S-32-alt", weights=str(path))
    model, spec = build_model(config, 64, seed=0)
    pixels, tokens, mask = batch(spec, 64)
    image, text, scale, _ = model.eval()("both", pixels, tokens, mask)
    theirs = open_clip.get_tokenizer("ViT-S-32-alt")(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(image.unit, peer.encode_image(pixels, normalize=True))
        torch.testing.assert_close(text.unit, peer.encode_text(theirs, normalize=True))
        torch.testing.assert_close(scale, peer.logit_scale.exp().reshape(1))
    torch.save({"visual.proj": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"model\.weights"):
        build_model(config, 64, seed=0)
    with pytest.raises(ConfigError, match=r"model\.embed_dim=7"):
        build_model(config.model_copy(update={"embed_dim": 7}), 64, seed=0)
