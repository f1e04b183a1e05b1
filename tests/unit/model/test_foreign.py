"""What a stranger's model folder asks for is refused in a sentence, and nothing of it runs."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
)
from transformers.integrations import hub_kernels

from mmscale.config.model import ModelConfig, TextConfig, VisionConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.build import build_model
from mmscale.model.registry_measure import measure
from mmscale.model.towers import build_text, build_vision
from tests.unit.model.tiny import CLIP_TEXT, CONVNEXT, save_bert

TEXT_CFG = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION_CFG = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}


@pytest.fixture
def marker(tmp_path) -> Path:
    """What the stranger's code makes where it runs."""
    return tmp_path / "ran"


class Runs:
    """Pickles to a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def change(file: Path, **settings) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings))


def bring_code(folder: Path, marker: Path) -> None:
    """A module in the folder, and files that name its classes."""
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import BertConfig as C, BertModel as M, BertTokenizer as T\n"
        "from transformers import ViTImageProcessor as P\n"
    )
    autos = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    change(folder / "config.json", model_type="evil", auto_map=autos)
    change(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=autos)
    more = {"AutoImageProcessor": "evil.P", "AutoProcessor": "evil.P"}
    change(folder / "preprocessor_config.json", image_processor_type="P", auto_map=more)


def save_openclip(folder: Path, text=TEXT_CFG, vision=VISION_CFG, **files) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": content, "preprocess_cfg": {}})
    )
    return folder


@pytest.mark.parametrize(
    "auto", [AutoConfig, AutoModel, AutoTokenizer, AutoImageProcessor, AutoProcessor]
)
@pytest.mark.parametrize("words", [{"trust_remote_code": True}, {}])
def test_no_caller_in_this_process_can_run_a_folders_code(
    bert_folder, marker, monkeypatch, auto, words
):
    bring_code(bert_folder, marker)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))  # to a question on the terminal
    with pytest.raises(Exception, match="never runs"):
        auto.from_pretrained(bert_folder, **words)
    assert not marker.exists()
    assert sys.stdin.read() == "y\ny\ny\n"


def test_no_caller_in_this_process_can_load_a_kernel_of_the_hub(monkeypatch):
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    for load in (hub_kernels.load_and_register_attn_kernel, hub_kernels.get_kernel):
        with pytest.raises(Exception, match=r"stranger/kernel.*never loads"):
            load("stranger/kernel")
    assert not hasattr(hub_kernels, "get_kernel_hub") or hub_kernels.get_kernel_hub is (
        hub_kernels.get_kernel
    )


def test_a_type_that_only_the_folders_code_knows_is_refused(bert_folder, marker):
    bring_code(bert_folder, marker)
    for build in (
        lambda: build_text(TextConfig(name=f"hf:{bert_folder}", weights="random")),
        lambda: build_vision(VisionConfig(name=f"hf:{bert_folder}", weights="random"), 32),
        lambda: measure(f"hf:{bert_folder}"),
    ):
        with pytest.raises(ConfigError, match="never runs"):
            build()
    assert not marker.exists()


def test_code_beside_a_known_type_is_left_alone(bert_folder, marker):
    bring_code(bert_folder, marker)
    change(bert_folder / "config.json", model_type="bert")
    change(bert_folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    tower, text = build_text(TextConfig(name=f"hf:{bert_folder}"))
    assert tower.width == 24
    assert len(text.tokenize(["a red dog"])[0]) == 5
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "settings", "named"),
    [
        ("config.json", {"attn_implementation": "who/kernel"}, "attn_implementation=who/kernel"),
        ("config.json", {"_attn_implementation": "who/k@v1:f"}, "_attn_implementation=who/k"),
        ("config.json", {"attn_implementation": {"": "eager", "part": "a/b"}}, "=a/b"),
        ("config.json", {"text_config": {"attn_implementation": "a/b"}}, "=a/b"),
        ("config.json", {"experts_implementation": "a/b"}, "experts_implementation=a/b"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("config.json", {"backbone": "who/model"}, "backbone=who/model"),
        ("config.json", {"trust_remote_code": True}, "trust_remote_code=True"),
        ("adapter_config.json", {"base_model_name_or_path": "who/model"}, "adapter_config.json"),
        ("tokenizer_config.json", {"trust_remote_code": 1}, "tokenizer_config.json"),
    ],
)
def test_a_hugging_face_folder_that_asks_for_more_than_data_is_refused(
    bert_folder, file, settings, named
):
    change(bert_folder / file, **settings)
    with pytest.raises(ConfigError, match=named.replace("/", "\\/")) as caught:
        build_text(TextConfig(name=f"hf:{bert_folder}", weights="random"))
    assert "\n" not in str(caught.value)


def test_options_may_not_ask_for_it_either(bert_folder, tmp_path):
    options = {"id2label": {"0": {"attn_implementation": "who/kernel"}}}
    with pytest.raises(ConfigError, match="who/kernel"):
        build_text(TextConfig(name=f"hf:{bert_folder}", weights="random", options=options))
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": Runs(tmp_path / "ran")}, file)
    settings = {**CONVNEXT, "options": {**CONVNEXT["options"], "checkpoint_path": str(file)}}
    with pytest.raises(ConfigError, match=r"checkpoint_path=.*model\.vision\.weights"):
        build_vision(VisionConfig(**settings), 32)
    for option, value in (("hf_model_name", "who/model"), ("tokenizer_kwargs", {"a": 1})):
        settings = {**CLIP_TEXT, "options": {**CLIP_TEXT["options"], option: value}}
        with pytest.raises(ConfigError, match=option):
            build_text(TextConfig(**settings))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("text", "vision", "named"),
    [
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, {}, "trust_remote_code"),
        ({"tokenizer_kwargs": {"reduction_mask": "syntax"}}, {}, "reduction_mask=syntax"),
        ({"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, {}, "bpe_path"),
        ({"tokenizer_kwargs": {"subfolder": ".."}}, {}, "subfolder"),
        ({"tokenizer_kwargs": ["clean"]}, {}, "no mapping"),
        ({"hf_model_name": "/srv/another/model"}, {}, "another/model"),
        ({"hf_model_name": "../another"}, {}, "another"),
        ({}, {"timm_model_name": "hf-hub:who/model"}, "hf-hub:who/model"),
        ({}, {"timm_model_name": "local-dir:/srv/model"}, "local-dir:/srv/model"),
    ],
)
def test_an_openclip_folder_that_asks_for_more_than_data_is_refused(
    tmp_path, marker, text, vision, named, whole
):
    folder = save_openclip(
        tmp_path / "clip", {**TEXT_CFG, "hf_tokenizer_name": "x", **text}, {**VISION_CFG, **vision}
    )
    name = f"openclip:local-dir:{folder}"
    if whole:
        model = {"preset": name}
    else:
        model = {"vision": {"name": name, "weights": "random"}, "text": CLIP_TEXT}
    with pytest.raises(ConfigError, match=named.replace("/", "\\/")):
        build_model(ModelConfig.model_validate({"embed_dim": 16, **model}), 32, 0)
    with pytest.raises(ConfigError, match=named.replace("/", "\\/")):
        measure(name)


def test_code_beside_an_openclip_model_does_not_run(tmp_path, marker):
    folder = save_openclip(tmp_path / "clip", {**TEXT_CFG, "hf_tokenizer_name": "x"})
    save_bert(tmp_path / "bert")
    shutil.copy(tmp_path / "bert" / "vocab.txt", folder)
    bring_code(folder, marker)
    name = f"openclip:local-dir:{folder}"
    for model in (
        {"preset": name},
        {"vision": CONVNEXT, "text": {"name": name, "weights": "random"}},
    ):
        with pytest.raises(ConfigError, match="never runs"):
            build_model(ModelConfig.model_validate({"embed_dim": 16, **model}), 32, 0)
    assert not marker.exists()


def test_a_text_tower_with_code_below_an_openclip_model_does_not_run(tmp_path, marker):
    hugging = {
        "hf_model_name": "below",
        "hf_tokenizer_name": "below",
        "hf_pooler_type": "mean_pooler",
    }
    folder = save_openclip(tmp_path / "clip", {"context_length": 16, **hugging})
    BertConfig().save_pretrained(tmp_path / "below")
    bring_code(tmp_path / "below", marker)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(ConfigError, match="never runs"):
            build_model(ModelConfig(preset=f"openclip:local-dir:{folder}", embed_dim=16), 32, 0)
    finally:
        os.chdir(before)
    assert not marker.exists()


def spoil(path: Path, kind: str, marker: Path) -> None:
    """A weights file that runs a command where it is unpickled, or is damaged."""
    if kind == "pickled":
        torch.save({"state_dict": Runs(marker)}, path)
    elif kind == "cut":
        torch.save({"weight": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-60])
    else:
        path.write_bytes({"empty": b"", "junk": b"junk", "text": b"a,b\n1,2\n"}[kind])


@pytest.mark.parametrize("kind", ["pickled", "cut", "empty", "junk", "text"])
def test_weights_that_hold_more_than_weights_are_refused_everywhere(
    tmp_path, bert_folder, marker, kind
):
    (bert_folder / "model.safetensors").unlink()
    spoil(bert_folder / "pytorch_model.bin", kind, marker)
    clip = save_openclip(tmp_path / "clip")
    spoil(clip / "open_clip_pytorch_model.bin", kind, marker)
    timm = tmp_path / "timm"
    timm.mkdir()
    facts = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    change(timm / "config.json", architecture="test_convnext", pretrained_cfg=facts)
    spoil(timm / "pytorch_model.bin", kind, marker)
    spoil(tmp_path / "w.pt", kind, marker)
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.pt").read_bytes())
    (tmp_path / "w.npz").write_bytes((tmp_path / "w.pt").read_bytes())
    preset = f"openclip:local-dir:{clip}"
    whole = {"preset": preset, "embed_dim": 16}
    for build in (
        lambda: build_text(TextConfig(name=f"hf:{bert_folder}")),
        lambda: build_vision(VisionConfig(name=f"timm:local-dir:{timm}"), 32),
        lambda: build_model(ModelConfig(**whole, weights="pretrained"), None, 0),
        *(
            lambda suffix=suffix: build_model(
                ModelConfig(**whole, weights=str(tmp_path / f"w.{suffix}")), None, 0
            )
            for suffix in ("pt", "safetensors", "npz")
        ),
        *(
            lambda suffix=suffix: build_vision(
                VisionConfig(**{**CONVNEXT, "weights": str(tmp_path / f"w.{suffix}")}), 32
            )
            for suffix in ("pt", "safetensors", "npz")
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            build()
        assert "\n" not in str(caught.value)
    assert not marker.exists()
