"""Tiny dual encoders of Hugging Face's with drawn weights, saved as their hub pages hold them."""

from pathlib import Path

import torch
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from tests.unit.model.tiny import WORDS

SIZE = 32
BODY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
VISION = {**BODY, "image_size": SIZE, "patch_size": 8}
TEXT = {
    **BODY,
    "vocab_size": 22,
    "max_position_embeddings": 16,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
ALT = {"hidden_size": 12, "max_position_embeddings": 20, "project_dim": 16}


def _dual():
    vision, text = ViTConfig(**VISION), BertConfig(**TEXT)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=12)
    return VisionTextDualEncoderModel(config, ViTModel(vision), BertModel(text))


def _of(model_class, config_class, text=TEXT, **words):
    return lambda: model_class(config_class(text_config=text, vision_config=VISION, **words))


MODELS = {
    "clip": _of(CLIPModel, CLIPConfig, projection_dim=12),
    "siglip": _of(SiglipModel, SiglipConfig, {**TEXT, "projection_size": 16}),
    "chinese_clip": _of(ChineseCLIPModel, ChineseCLIPConfig, projection_dim=12),
    "altclip": _of(AltCLIPModel, AltCLIPConfig, {**TEXT, **ALT}, projection_dim=16),
    "dual_encoder": _dual,
}


def save_whole(folder: Path, kind: str, squash: bool | None = None):
    """A model of this kind with its tokenizer and preprocessing; the model, too."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Drawn as they come, biases are 0 and positions next to nothing.
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.25)
        if kind == "siglip":
            model.logit_bias.fill_(-7.5)
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    names = ["input_ids"] if kind == "siglip" else ["input_ids", "attention_mask"]
    BertTokenizerFast(
        vocab=str(folder / "vocab.txt"), model_max_length=16, model_input_names=names
    ).save_pretrained(folder)
    if squash if squash is not None else kind == "siglip":
        processor = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    else:
        crop = {"height": SIZE, "width": SIZE}
        processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    processor.save_pretrained(folder)
    return model
