from pathlib import Path
from time import perf_counter

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from mmscale.config.model import TextConfig, VisionConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model import hub
from mmscale.model.towers import build_text, build_vision
from tests.unit.model.tiny import CLIP_TEXT, CONVNEXT

OPTIONS = CONVNEXT["options"]


@pytest.fixture
def weights(tmp_path) -> dict[str, torch.Tensor]:
    return build_vision(VisionConfig(**CONVNEXT), 64)[0].trunk.state_dict()


def from_file(path: Path) -> VisionConfig:
    return VisionConfig(**{**CONVNEXT, "weights": str(path)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_fills_every_tensor_in_fp32(tmp_path, weights, suffix):
    path = tmp_path / f"weights{suffix}"
    half = {name: tensor.half() for name, tensor in weights.items()}
    half["head.fc.weight"] = torch.zeros(10, 40)  # a classifier is of no use to a tower
    if suffix == ".pth":
        torch.save({"state_dict": half}, path)
    else:
        save_file(half, path)
    loaded = build_vision(from_file(path), 64)[0].trunk.state_dict()
    for name, tensor in weights.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.half().float())


def test_every_mismatch_is_counted_and_the_first_five_named(tmp_path, weights):
    path = tmp_path / "weights.safetensors"
    names = sorted(weights)
    wrong = {name: weights[name] for name in names[8:]}
    wrong[names[8]] = torch.zeros(3, 5)
    wrong["stranger"] = torch.zeros(1)
    save_file(wrong, path)
    with pytest.raises(CheckpointError) as caught:
        build_vision(from_file(path), 64)
    message = str(caught.value)
    assert "10 tensors" in message
    assert message.count("is missing") == 5
    assert str(path) in message


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, weights):
    path = tmp_path / "weights.safetensors"
    weights["stem.0.weight"] = torch.zeros(3, 5)
    save_file(weights, path)
    with pytest.raises(
        CheckpointError, match=r"stem\.0\.weight is \[3, 5\] instead of \[8, 3, 4, 4\]"
    ):
        build_vision(from_file(path), 64)


def test_what_is_not_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        build_vision(from_file(tmp_path / "absent.safetensors"), 64)
    for suffix, content in ((".safetensors", b"nonsense"), (".pth", b"nonsense")):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="broken"):
            build_vision(from_file(path), 64)
    torch.save({"weights": Path("code")}, tmp_path / "object.pth")
    with pytest.raises(CheckpointError, match=r"object\.pth"):
        build_vision(from_file(tmp_path / "object.pth"), 64)


def test_pretrained_weights_that_lack_a_block_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    whole = timm.create_model("convnext_atto", num_classes=7, **OPTIONS).state_dict()
    overlay = {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}
    config = VisionConfig(name="timm:convnext_atto", options={**OPTIONS, **overlay})
    save_file(whole, path)
    loaded = build_vision(config, 64)[0].trunk.state_dict()
    assert torch.equal(loaded["stem.0.weight"], whole["stem.0.weight"])
    dropped = "stages.1.blocks.0.mlp.fc1.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != dropped}, path)
    with pytest.raises(CheckpointError, match=dropped):
        build_vision(config, 64)


def test_a_folder_that_lacks_a_tensor_is_refused(bert_folder):
    path = bert_folder / "model.safetensors"
    tensors = load_file(path)
    dropped = "encoder.layer.1.output.dense.weight"
    save_file({n: t for n, t in tensors.items() if n != dropped}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=dropped):
        build_text(TextConfig(name=f"hf:{bert_folder}"))
    path.unlink()
    with pytest.raises(ConfigError, match=str(bert_folder)):
        build_text(TextConfig(name=f"hf:{bert_folder}"))


def test_options_that_contradict_pretrained_weights_are_refused(bert_folder):
    for options in ({"hidden_size": 12}, {"num_hidden_layers": 3}):
        with pytest.raises(CheckpointError, match="pretrained weights"):
            build_text(TextConfig(name=f"hf:{bert_folder}", options=options))


def test_a_task_model_fills_a_text_tower(bert_folder, tmp_path):
    task = BertForMaskedLM(BertConfig.from_pretrained(bert_folder))
    path = tmp_path / "task.pth"
    torch.save(task.state_dict(), path)
    tower, _ = build_text(TextConfig(name=f"hf:{bert_folder}", weights=str(path)))
    for name, tensor in tower.trunk.state_dict().items():
        assert torch.equal(tensor, task.bert.state_dict()[name])


def test_a_whole_clip_fills_an_openclip_text_tower(tmp_path):
    tower, _ = build_text(TextConfig(**CLIP_TEXT))
    path = tmp_path / "clip.safetensors"
    whole = {f"{name}": tensor for name, tensor in tower.trunk.state_dict().items()}
    extra = {"visual.proj": torch.zeros(2), "logit_scale": torch.zeros(1)}
    save_file({**whole, **extra, "text_projection": torch.zeros(2, 2)}, path)
    again, _ = build_text(TextConfig(**{**CLIP_TEXT, "weights": str(path)}))
    for name, tensor in again.trunk.state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_mobilenet_loads_strictly(test_data):
    path = test_data / "weights" / "mobilenetv2_100.safetensors"
    if not path.is_file():
        pytest.skip("no MobileNetV2 weights among the test data")
    config = VisionConfig(
        name="timm:mobilenetv2_100", weights=str(path), options={"pad_type": "same"}
    )
    tower, pixels = build_vision(config, 160)
    assert tower.width == 1280
    assert pixels.image_size == 160
    loaded = load_file(path)["conv_head.weight"].float()
    assert torch.equal(tower.trunk.conv_head.weight, loaded)


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_hub_the_model_and_the_repair_are_named_within_seconds(monkeypatch, offline):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.hub_reachable.cache_clear()
    start = perf_counter()
    for name in ("timm:vit_tiny_patch16_224", "hf:nobody/no-vision-model"):
        with pytest.raises(ConfigError, match=name) as caught:
            build_vision(VisionConfig(name=name), None)
        assert "cannot be reached" in str(caught.value)
    with pytest.raises(ConfigError, match=r"nobody/no-bert.*hf:/path/to/folder"):
        build_text(TextConfig(name="hf:nobody/no-bert"))
    assert perf_counter() - start < 20
    assert constants.HF_HUB_OFFLINE is offline
    hub.hub_reachable.cache_clear()
