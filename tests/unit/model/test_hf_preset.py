"""`model.preset=hf:NAME`: what a whole model of Hugging Face's gives is what the library gives."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BertConfig, BertModel

from mmscale.config.load import validate
from mmscale.config.model import ModelConfig, TextConfig, VisionConfig
from mmscale.data.pixels import EvalTransform, normalise
from mmscale.errors import ConfigError
from mmscale.model import hub
from mmscale.model.build import build_model
from mmscale.model.kept import kept_towers, tower_files
from mmscale.model.presets import fill_preset
from mmscale.model.towers import build_text, build_vision
from tests.unit.model.test_openclip_weights import picture
from tests.unit.model.tiny import padded
from tests.unit.model.whole_hf import MODELS, save_whole

CAPTIONS = ["a red dog runs on the left of two cats", "two cats"]
LANDSCAPE, PORTRAIT = (90, 140), (150, 80)


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


def their_pixels(folder, shape):
    processor = AutoImageProcessor.from_pretrained(folder)
    return processor(Image.fromarray(picture(*shape)), return_tensors="pt")["pixel_values"]


def our_pixels(spec, shape):
    crop = EvalTransform(spec)(torch.from_numpy(picture(*shape)).permute(2, 0, 1))
    return normalise(crop[None], spec)


def their_words(folder, kind):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if kind == "siglip" else True
    return tokenizer(CAPTIONS, padding=padding, max_length=16, truncation=True, return_tensors="pt")


def our_words(spec):
    rows = spec.tokenize(CAPTIONS)
    return padded(rows, max(map(len, rows)), spec.pad_token)


def whole(folder, **settings):
    config = ModelConfig.model_validate({"preset": f"hf:{folder}", **settings})
    model, spec = build_model(config, None, 0)
    return model.eval(), spec


def test_embeddings_scale_and_bias_of_a_photograph_and_captions_are_the_models_own(tmp_path, kind):
    theirs = save_whole(tmp_path, kind)
    model, spec = whole(tmp_path, logit_scale={"bias": -1.0})
    with torch.no_grad():
        image, text, scale, bias = model("both", our_pixels(spec, LANDSCAPE), *our_words(spec))
        pictured = theirs.get_image_features(pixel_values=their_pixels(tmp_path, LANDSCAPE))
        said = theirs.get_text_features(**their_words(tmp_path, kind))
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(image.unit, F.normalize(pictured.pooler_output), **close)
    torch.testing.assert_close(text.unit, F.normalize(said.pooler_output), **close)
    torch.testing.assert_close(scale, theirs.logit_scale.detach().exp().reshape(1), **close)
    assert float(bias) == (-7.5 if kind == "siglip" else -1.0)


@pytest.mark.parametrize("shape", [LANDSCAPE, PORTRAIT])
@pytest.mark.parametrize("squash", [True, False])
def test_preprocessing_is_that_of_the_models_processor(tmp_path, squash, shape):
    save_whole(tmp_path, "clip", squash)
    _, spec = whole(tmp_path)
    ours, theirs = our_pixels(spec, shape), their_pixels(tmp_path, shape)
    std = torch.tensor(spec.std).view(3, 1, 1)
    assert ((ours - theirs) * std).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("shape", [LANDSCAPE, PORTRAIT])
@pytest.mark.parametrize("kind", ["squash", "shortest", "old"])
def test_an_image_tower_alone_obeys_its_processor_too(tmp_path, bert_folder, kind, shape):
    save_whole(tmp_path, "dual_encoder", squash=kind != "shortest").vision_model.save_pretrained(
        tmp_path
    )
    if kind == "old":
        # As pages had it before sides had names.
        old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "do_resize": True}
        facts = json.loads((tmp_path / "preprocessor_config.json").read_text())
        kept = {key: facts[key] for key in ("image_mean", "image_std", "resample")}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**old, **kept}))
    text = {"name": f"hf:{bert_folder}", "weights": "random"}
    towers = {"vision": {"name": f"hf:{tmp_path}"}, "text": text}
    _, spec = build_model(ModelConfig.model_validate(towers), None, 0)
    assert spec.resize == ("shortest" if kind == "shortest" else "squash")
    ours, theirs = our_pixels(spec, shape), their_pixels(tmp_path, shape)
    std = torch.tensor(spec.std).view(3, 1, 1)
    assert ((ours - theirs) * std).abs().max() <= 1 / 255 + 1e-6


def test_a_step_of_training_has_the_loss_and_gradients_of_a_plain_loop(tmp_path):
    theirs = save_whole(tmp_path, "clip").train()
    model, spec = whole(tmp_path)
    model.train()
    pixels = torch.cat([our_pixels(spec, LANDSCAPE), our_pixels(spec, PORTRAIT)])
    tokens, mask = our_words(spec)
    image, text, scale, _ = model("both", pixels, tokens, mask)
    logits, target = scale * image.unit @ text.unit.T, torch.arange(2)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    wanted = theirs(
        input_ids=tokens, pixel_values=pixels, attention_mask=mask.long(), return_loss=True
    ).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-5)
    mine = {name.split("trunk.")[-1]: p.grad for name, p in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        got = mine["scale.log_scale"][0] if name == "logit_scale" else mine[name]
        torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-5)


def test_what_a_checkpoint_keeps_of_it_builds_it_again_without_the_folder(
    tmp_path, kind, monkeypatch
):
    save_whole(tmp_path / "lying", kind)
    filled = fill_preset(ModelConfig(preset=f"hf:{tmp_path / 'lying'}"))
    model, spec = build_model(filled, 48, 0)
    files = tower_files(filled)
    assert not [name for name in files if not name.endswith((".json", ".txt"))]
    (tmp_path / "lying").rename(tmp_path / "gone")
    for name, content in files.items():
        (tmp_path / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kept" / name).write_bytes(content)
    kept = kept_towers(filled, filled, tmp_path / "kept", files)
    monkeypatch.chdir("/")
    with hub.fetching_only(()):
        again, spec_again = build_model(kept, 48, 7, fill=False)
    again.load_state_dict(model.state_dict())
    assert spec_again.tokenize(CAPTIONS) == spec.tokenize(CAPTIONS)
    inputs = torch.rand(1, 3, 48, 48), *our_words(spec)
    with torch.no_grad():
        before, now = model.eval()("both", *inputs), again.eval()("both", *inputs)
    for one, other in zip(before[:2], now[:2], strict=True):
        # Tables that were read and drawn ones lie otherwise in memory, which changes last digits.
        torch.testing.assert_close(one.unit, other.unit, rtol=0, atol=1e-6)


def test_its_weights_are_its_own_unless_random_ones_are_asked_for(tmp_path):
    theirs = save_whole(tmp_path, "clip").state_dict()
    own, _ = whole(tmp_path)
    for part in ("vision", "text"):
        for name, tensor in own.get_submodule(part).trunk.state_dict().items():
            assert torch.equal(tensor, theirs[name])
    drawn, _ = whole(tmp_path, weights="random")
    name = "visual_projection.weight"
    assert not torch.equal(drawn.vision.trunk.state_dict()[name], theirs[name])
    assert float(drawn.scale().detach()) == pytest.approx(1 / 0.07)


def test_another_image_size_interpolates_the_table_of_positions(tmp_path):
    theirs = save_whole(tmp_path, "clip")
    model, spec = build_model(ModelConfig(preset=f"hf:{tmp_path}"), 64, 0)
    assert spec.image_size == 64
    before = theirs.vision_model.embeddings.position_embedding.weight
    after = model.vision.trunk.vision_model.embeddings.position_embedding.weight
    assert (len(before), len(after)) == (17, 65)
    grid = before[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(after, torch.cat([before[:1], wanted]), rtol=0, atol=1e-6)
    assert model("image", torch.zeros(1, 3, 64, 64)).shape == (1, 12)


REFUSED = {
    "another width": ({"embed_dim": 77}, "embed_dim=77, but .* is 12 wide"),
    "a head": ({"head": {"bias": True}}, r"model\.head\.bias=True"),
    "a pooling": ({"vision": {"pooling": "mean"}}, r"model\.vision\.options, \.weights and"),
    "a lower bound": ({"logit_scale": {"max": 20}}, "raise model.logit_scale.max"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_contradict_the_model_are_refused(tmp_path, case):
    save_whole(tmp_path, "clip")
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        whole(tmp_path, **copy.deepcopy(settings))


def test_a_model_of_one_tower_is_no_preset(tmp_path):
    BertModel(BertConfig(hidden_size=16, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.preset=hf:\S+ is a bert model"):
        whole(tmp_path)


def test_both_halves_of_one_model_without_its_projections_are_refused(tmp_path, kind):
    save_whole(tmp_path, kind)
    name = f"hf:{tmp_path}"
    towers = {"vision": {"name": name}, "text": {"name": name}}
    with pytest.raises(ConfigError, match=rf"set model\.preset={name}"):
        build_model(ModelConfig.model_validate(towers), None, 0)


def test_so_are_both_halves_of_one_openclip_model():
    tower = {"name": "openclip:ViT-B-32"}
    with pytest.raises(ConfigError, match=r"set model\.preset=openclip:ViT-B-32"):
        build_model(ModelConfig.model_validate({"vision": tower, "text": tower}), None, 0)


def test_the_default_of_weights_survives_a_stored_configuration(tmp_path):
    save_whole(tmp_path, "clip")
    config = validate({"data": {"train": "none"}, "model": {"preset": f"hf:{tmp_path}"}})
    filled = fill_preset(config.model)
    assert (filled.weights, filled.embed_dim) == ("pretrained", 12)
    assert fill_preset(ModelConfig.model_validate(filled.model_dump())) == filled
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "CLIPModel"


@pytest.mark.parametrize("kind", ["clip", "siglip", "dual_encoder"])
def test_an_image_tower_alone_takes_another_size_too(tmp_path, kind):
    theirs = save_whole(tmp_path, kind).vision_model
    if kind == "dual_encoder":
        theirs.save_pretrained(tmp_path)
    tower, pixels = build_vision(VisionConfig(name=f"hf:{tmp_path}"), 64)
    assert pixels.image_size == 64
    own, _ = build_vision(VisionConfig(name=f"hf:{tmp_path}"), None)
    assert tower(torch.zeros(1, 3, 64, 64)).shape == own(torch.zeros(1, 3, 32, 32)).shape
    drawn = VisionConfig(name=f"hf:{tmp_path}", weights="random")
    shapes = {n: p.shape for n, p in build_vision(drawn, 64)[0].named_parameters()}
    assert {n: p.shape for n, p in tower.named_parameters()} == shapes


def test_the_text_tower_of_a_siglip_alone_is_refused(tmp_path):
    save_whole(tmp_path, "siglip")
    with pytest.raises(ConfigError, match="siglip_text_model model, which cannot serve"):
        build_text(TextConfig(name=f"hf:{tmp_path}"))
