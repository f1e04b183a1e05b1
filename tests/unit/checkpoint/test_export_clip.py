"""A whole model of Hugging Face's, trained on, goes back to a folder of its own class."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from mmscale.checkpoint.export import Exported, export
from mmscale.config.load import validate
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import DualEncoder
from mmscale.model.presets import fill_preset
from tests.unit.model.test_hf_preset import (
    LANDSCAPE,
    PORTRAIT,
    our_pixels,
    our_words,
    their_pixels,
    their_words,
)
from tests.unit.model.whole_hf import MODELS, save_whole

CLOSE = {"rtol": 0, "atol": 1e-5}


def opened(folder, out):
    model = {"preset": f"hf:{folder}", "logit_scale": {"bias": -2.0}}
    config = validate({"data": {"train": "unused"}, "model": model})
    config = config.model_copy(update={"model": fill_preset(config.model)})
    built, spec = build_model(config.model, None, 0)
    return Exported(config, DualEncoder(built, spec.pad_token), spec, out)


@pytest.mark.parametrize("kind", MODELS)
def test_a_moved_export_is_its_class_and_a_preset_again(tmp_path, kind):
    save_whole(tmp_path / "first", kind)
    what = opened(tmp_path / "first", tmp_path / "out")
    with torch.no_grad():
        for parameter in what.encoder.model.parameters():  # trained on
            parameter.add_(0.05 * torch.randn_like(parameter))
    export(what, "clip")
    (tmp_path / "first").rename(tmp_path / "gone")
    moved = what.out.rename(tmp_path / "moved")
    theirs = AutoModel.from_pretrained(moved).eval()
    assert type(theirs) is type(MODELS[kind]())
    pixels, words = our_pixels(what.spec, LANDSCAPE), our_words(what.spec)
    image, text, scale, bias = what.encoder.model("both", pixels, *words)
    pictured = theirs.get_image_features(pixel_values=their_pixels(moved, LANDSCAPE))
    torch.testing.assert_close(F.normalize(pictured.pooler_output), image.unit, **CLOSE)
    said = their_words(moved, kind)
    if kind == "siglip":
        said.pop("attention_mask", None)
    told = theirs.get_text_features(**said)
    torch.testing.assert_close(F.normalize(told.pooler_output), text.unit, **CLOSE)
    torch.testing.assert_close(theirs.logit_scale.exp().reshape(1), scale, rtol=1e-6, atol=0)
    if kind == "siglip":
        torch.testing.assert_close(theirs.logit_bias.reshape(1), bias, rtol=0, atol=0)
    back = opened(moved, tmp_path / "again")
    assert torch.equal(our_pixels(back.spec, PORTRAIT), our_pixels(what.spec, PORTRAIT))
    for now, before in zip(
        back.encoder.model("both", pixels, *words)[:3], (image, text, scale), strict=True
    ):
        now, before = (getattr(one, "unit", one) for one in (now, before))
        torch.testing.assert_close(now, before, rtol=1e-6, atol=1e-5)


def test_a_whole_model_fits_no_format_of_towers_and_towers_fit_no_whole_class(tmp_path):
    save_whole(tmp_path / "first", "clip")
    what = opened(tmp_path / "first", tmp_path / "out")
    for to in ("hf", "open_clip", "sentence_transformers"):
        with pytest.raises(ConfigError, match=r"export to .*clip"):
            export(what, to)
    towers = {"vision": {"name": "timm:test_vit"}, "text": {"name": "hf:nowhere"}}
    config = validate({"data": {"train": "unused"}, "model": towers})
    with pytest.raises(ConfigError, match=r"test_vit: --to clip writes.*export to .*open_clip"):
        export(Exported(config, what.encoder, what.spec, tmp_path / "out"), "clip")
    assert not (tmp_path / "out").exists()
