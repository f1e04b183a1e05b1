"""Registered figures are those of the models, read again."""

import dataclasses
import runpy
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
from transformers import BertConfig

from mmscale.errors import ConfigError
from mmscale.model.outline import config_of
from mmscale.model.registry import curated, curated_names, entries, entry_json, find, overview
from mmscale.model.registry_measure import measure
from mmscale.parallel.device import FAILING_TOWERS
from tools.tower_pairs import all_pairs, train_pairs

ROOT = Path(__file__).resolve().parents[3]
CURATED = [*curated_names("vision"), *curated_names("text")]
OPENCLIP = [name for name, entry in entries().items() if entry.part == "pair"]
# Millions of parameters and GFLOPs of image and text tower as OpenCLIP's own profile lists them
# (docs/model_profile.csv there); captions of Hugging Face's towers are longer in its FLOPs.
PROFILED = {
    "ViT-B-32": (87.85, 63.43, 8.82, 5.96),
    "ViT-B-16-SigLIP": (92.88, 110.27, 35.42, 11.02),
    "RN50": (38.32, 63.69, 12.22, 5.96),
    "convnext_base_w": (88.22, 91.16, 40.11, 9.27),
    "EVA02-B-16": (86.26, 63.43, 35.13, 5.96),
    "coca_ViT-L-14": (306.72, 123.65, 163.64, 13.3),
    "ViT-H-14": (632.08, 354.03, 334.59, 47.09),
    "ViT-bigG-14": (1844.91, 694.66, 967.5, 97.86),
    "roberta-ViT-B-32": (87.85, 124.87, 8.82, None),
    "xlm-roberta-large-ViT-H-14": (632.08, 560.94, 334.59, None),
    "mt5-xl-ViT-H-14": (632.08, 1674.68, 334.59, 179.45),
    "nllb-clip-large": (632.08, 767.14, 334.59, None),
}
# What the issue that asks for the registry says of them, and the towers' papers.
WIDTHS = {
    "timm:vit_base_patch16_384": 768,
    "timm:beit_large_patch16_512": 1024,
    "timm:vit_small_patch16_224": 384,
    "timm:mobilenetv2_100": 1280,
    "hf:google/mobilebert-uncased": 512,
    "hf:microsoft/MiniLM-L12-H384-uncased": 384,
    "hf:sentence-transformers/all-MiniLM-L6-v2": 384,
    "hf:flaubert/flaubert_small_cased": 512,
    "hf:answerdotai/ModernBERT-base": 768,
}


@pytest.mark.parametrize("name", CURATED)
def test_every_curated_architecture_has_its_registered_figures(name):
    """Built whole from its configuration, on the meta device, with every figure read again."""
    (found,), registered = measure(name), entries()[name]
    assert replace(found, flops=registered.flops) == registered
    # Releases of a library make a mask with some operations more or less.
    assert found.flops == pytest.approx(registered.flops, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "openclip:ViT-B-32" else pytest.mark.soak)
        for name in OPENCLIP
    ],
)
def test_every_openclip_model_has_its_registered_figures(name):
    assert measure(name) == [entries()[name]]


def test_every_openclip_configuration_is_registered():
    assert {f"openclip:{name}" for name in open_clip.list_models()} == set(OPENCLIP)


def test_known_widths():
    assert {name: entries()[name].width for name in WIDTHS} == WIDTHS


@pytest.mark.parametrize("name", PROFILED)
def test_openclips_own_profile_agrees(name):
    vision, text, vision_flops, text_flops = PROFILED[name]
    parts = entries()[f"openclip:{name}"].parts
    assert parts["vision"]["parameters"] / 1e6 == pytest.approx(vision, abs=0.006)
    assert parts["text"]["parameters"] / 1e6 == pytest.approx(text, abs=0.006)
    assert parts["vision"]["flops"] / 1e9 == pytest.approx(vision_flops, abs=0.006)
    if text_flops is not None:
        assert parts["text"]["flops"] / 1e9 == pytest.approx(text_flops, abs=0.02)


def test_licences_of_timm_are_those_of_its_model_cards():
    for name in curated_names("vision"):
        if name.startswith("timm:"):
            facts = timm.get_pretrained_cfg(name.removeprefix("timm:"))
            assert entries()[name].licence == facts.license == "apache-2.0"


def test_a_configuration_is_that_of_the_released_model():
    """all-MiniLM-L6-v2 is here whole: its file and our description make the same model."""
    from tests.unit.model.test_towers import minilm

    ours = config_of(curated()["text"]["hf:sentence-transformers/all-MiniLM-L6-v2"]["config"])
    theirs = BertConfig.from_pretrained(minilm())
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        assert getattr(ours, key) == getattr(theirs, key)
    [read] = measure(f"hf:{minilm()}")
    registered = entries()["hf:sentence-transformers/all-MiniLM-L6-v2"]
    assert dataclasses.replace(read, name="", licence="") == dataclasses.replace(
        registered, name="", licence=""
    )


def test_models_that_are_not_registered_are_read(bert_folder, tmp_path):
    [entry] = measure("timm:mobilenetv3_small_050")  # its num_features says 288
    assert (entry.width, entry.sequence_width, entry.image_size) == (1024, 288, 224)
    assert entry.parameters == sum(
        p.numel() for p in timm.create_model("mobilenetv3_small_050", num_classes=0).parameters()
    )
    [entry] = measure(f"hf:{bert_folder}")
    assert (entry.width, entry.blocks, entry.context_length) == (24, 2, 32)
    with pytest.raises(ConfigError, match="convnext_atto"):
        measure("timm:convnext_attto")


def test_a_model_of_two_parts_has_two_entries(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    sizes = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(**sizes, intermediate_size=32, vocab_size=50, eos_token_id=3)
    vision = CLIPVisionConfig(**sizes, intermediate_size=32, image_size=32, patch_size=16)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    image, caption = measure(f"hf:{tmp_path}")
    assert (image.part, image.width, image.image_tokens) == ("vision", 20, 5)
    assert (caption.part, caption.width, caption.vocabulary) == ("text", 20, 50)


def test_names_are_found_with_and_without_their_source():
    assert find("timm:vit_base_patch16_224") is find("vit_base_patch16_224")
    assert find("bert-base-uncased").name == "hf:google-bert/bert-base-uncased"
    assert find("ViT-B-32").part == "pair"
    assert find("no-such-model") is None


def test_the_overview_and_the_figures_say_where_a_tower_fails():
    bert = entry_json(entries()["hf:google-bert/bert-base-uncased"], FAILING_TOWERS)
    assert bert["fails_on"] == ["mps"]
    assert bert["memory_bytes"] == 4 * bert["parameters"]
    assert entry_json(entries()["hf:albert/albert-base-v2"], FAILING_TOWERS)["fails_on"] == []
    text = overview(FAILING_TOWERS)
    for name in ("beit_large_patch16_512", "medium-mobilebert", "openclip:ViT-bigG-14"):
        assert name in text
    # A stand-in must be known, and as wide as what it stands in for: the heads stay.
    for towers in FAILING_TOWERS.values():
        for name, stand_in in towers.items():
            assert entries()[name].width == entries()[stand_in].width


def page():
    return runpy.run_path(str(ROOT / "tools" / "write_models.py"))


def test_the_page_of_models_is_up_to_date():
    tool = page()
    rows = tool["written"]()
    assert tool["PAGE"].read_text("utf-8") == tool["page"](rows), "run python tools/write_models.py"
    expected = [(f"`{vision}`", f"`{text}`") for vision, text in all_pairs()]
    assert [tuple(row.split(" | ")[index].strip("| ") for index in (0, 2)) for row in rows] == (
        expected
    ), "run python tools/write_models.py --pairs"


SAMPLE = [
    ("timm:beit_large_patch16_512", "hf:flaubert/flaubert_small_cased"),
    ("timm:mobilenetv2_100", "hf:answerdotai/ModernBERT-base"),
    ("hf:google/vit-base-patch16-224-in21k", "hf:albert/albert-base-v2"),
]


@pytest.mark.parametrize("pairs", [SAMPLE, pytest.param(all_pairs(), marks=pytest.mark.soak)])
def test_any_image_tower_trains_with_any_text_tower(pairs):
    """Two updates each; both towers move. The page's rows are what this prints."""
    tool = page()
    rows = {tool["row"](pair) for pair in train_pairs(pairs)}
    assert len(rows) == len(pairs)
    assert rows <= set(tool["written"]())
