"""Tiny towers and a local Hugging Face folder, made on the spot: none needs a hub."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from mmscale.config.model import ModelConfig

WORDS = [
    "a",
    "the",
    "red",
    "green",
    "small",
    "large",
    "dog",
    "cat",
    "square",
    "circle",
    "runs",
    "sits",
    "on",
    "under",
    "left",
    "of",
    "two",
]
CONVNEXT = {
    "name": "timm:convnext_atto",
    "weights": "random",
    "options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 40]},
}
CLIP_TEXT = {
    "name": "openclip:ViT-B-32",
    "weights": "random",
    "options": {"width": 32, "heads": 2, "layers": 2, "context_length": 20},
}


def save_bert(folder: Path) -> Path:
    """A BERT of width 24 with random weights, and its tokenizer."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def model_config(**settings) -> ModelConfig:
    """A model of tiny towers, changed by `settings`."""
    return ModelConfig.model_validate(
        {"vision": CONVNEXT, "text": CLIP_TEXT, "embed_dim": 16, **settings}
    )


def padded(rows: list[list[int]], length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows and mask at a common length."""
    tokens = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return tokens, mask
