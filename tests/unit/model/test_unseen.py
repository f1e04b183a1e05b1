"""Which pixels no patch reaches: told, and true of the tower's own gradient."""

import pytest
import torch

from mmscale.config.model import VisionConfig
from mmscale.model.tower import unseen_line
from mmscale.model.towers import build_vision

TOWERS = {
    "timm:vit_tiny_patch16_224": {"depth": 1},
    "openclip:ViT-B-32": {"width": 32, "layers": 1, "head_width": 16, "patch_size": 16},
    "timm:swin_tiny_patch4_window7_224": {"depths": [1, 1], "embed_dim": 12, "num_heads": [1, 2]},
    "timm:convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "timm:mobilenetv2_100": {},
    "timm:tf_efficientnet_lite0": {},
    "timm:resnet18": {},
}
SHORTCUTS = {"timm:tf_efficientnet_lite0", "timm:resnet18"}
VITS = {("timm:vit_tiny_patch16_224", 100), ("openclip:ViT-B-32", 100)}


@pytest.mark.parametrize("size", [96, 100])
@pytest.mark.parametrize("name", TOWERS)
def test_the_line_says_what_the_gradient_says(name, size):
    if "swin" in name and size == 100:
        size = 112
    config = VisionConfig(name=name, weights="random", options=TOWERS[name])
    tower, _ = build_vision(config, size)
    line = unseen_line(tower, size)
    assert (line is not None) == ((name, size) in VITS)
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, size, size, requires_grad=True)
    features = tower.eval()(pixels)
    (features * torch.randn_like(features)).sum().backward()
    dead = (pixels.grad.abs().sum((0, 1)) == 0).all(0)
    # Residual branches of some begin at zero, which hides pixels from the gradient.
    if name not in SHORTCUTS:
        assert int(dead.sum()) == (4 if line else 0)
    if line:
        assert dead[-4:].all()
        assert "patches of 16 pixels never see the last 4 rows and columns" in line
        assert "96 and 112 leave none unseen" in line


@pytest.mark.parametrize("size", [28, 30, 41])
def test_towers_of_hugging_face(size, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    tower, _ = build_vision(VisionConfig(name=f"hf:{tmp_path}", weights="random"), size)
    line = unseen_line(tower, size)
    assert (line is None) == (size == 28)
    assert line is None or f"the last {size % 14} rows" in line
