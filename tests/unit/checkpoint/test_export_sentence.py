"""The folder that SentenceTransformer loads: strings and pictures by its own preprocessing."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmscale.checkpoint.export import export, require_exportable
from mmscale.errors import ConfigError
from mmscale.evaluation.trained import Transform
from mmscale.model.dual_encoder import Tokenizer
from tests.unit.checkpoint.test_export import (
    CAPTIONS,
    CLIP_VISION,
    TIMM,
    exported,
    hf_pair,
)
from tests.unit.model.tiny import save_bert

library = pytest.importorskip(
    "sentence_transformers", reason="the sentence-transformers extra is not installed"
)


def pictures():
    """A landscape and a portrait, smooth enough that resizing hardly matters.

    What is cut away is even: of an odd number of rows, the libraries leave out another one.
    """
    found = []
    for width, height in ((96, 64), (64, 96)):
        across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        rows = np.stack([across, down, 255 - across], -1).astype(np.uint8)
        found.append(Image.fromarray(rows))
    return found


def pairs(folder, bert, towers):
    vit = {"name": "timm:test_vit", "weights": "random"}
    clip = hf_pair(folder)
    return {
        "clip": clip,
        "timm mean": {"vision": TIMM, "text": bert | {"pooling": "mean"}, "embed_dim": 24},
        "timm cls": {"vision": vit, "text": bert | {"pooling": "cls"}, "embed_dim": 24},
        "bias": {
            "vision": vit,
            "text": bert | {"pooling": "eos", "adapter": {"kind": "lora", "rank": 2}},
            "embed_dim": 16,
            "head": {"bias": True},
        },
    }[towers]


@pytest.mark.parametrize("towers", ["clip", "timm mean", "timm cls", "bias"])
def test_strings_and_pictures_give_our_embeddings(tmp_path, towers):
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random"}
    size = 32 if towers != "bias" else 48
    what = exported(tmp_path / "out", pairs(tmp_path / "pair", bert, towers), size)
    export(what, "sentence_transformers")
    moved = tmp_path / "moved"
    shutil.move(what.out, moved)
    shutil.rmtree(tmp_path / "bert")
    model = library.SentenceTransformer(str(moved), device="cpu")
    texts = torch.from_numpy(model.encode(CAPTIONS))
    ours = what.encoder.encode_text(Tokenizer(what.spec)(CAPTIONS), normalize=True)
    torch.testing.assert_close(texts, ours, atol=1e-5, rtol=0)
    images = torch.from_numpy(model.encode(pictures()))
    pixels = torch.stack([Transform(what.spec)(picture) for picture in pictures()])
    ours = what.encoder.encode_image(pixels, normalize=True)
    # With each side's own resizing.
    torch.testing.assert_close(images, ours, atol=5e-3, rtol=0)
    assert model.max_seq_length == what.spec.context_length
    norms = torch.linalg.norm(torch.cat([texts, images]), dim=1)
    torch.testing.assert_close(norms, torch.ones(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"vision": CLIP_VISION}, r"model\.vision\.name=openclip:ViT-B-32.*and timm's"),
        ({"text": {"pooling": "map"}}, r"model\.text\.pooling=map"),
        ({"head": {"kind": "mlp"}}, "the image head is no linear map"),
    ],
)
def test_what_it_cannot_express_is_named(tmp_path, model, named):
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random"}
    text = bert | model.pop("text", {})
    what = exported(tmp_path / "out", {"vision": TIMM, "text": text, "embed_dim": 16} | model)
    with pytest.raises(ConfigError, match=named):
        export(what, "sentence_transformers")


def test_without_the_library_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random"}
    what = exported(tmp_path / "out", {"vision": TIMM, "text": bert, "embed_dim": 16})
    monkeypatch.setattr("mmscale.checkpoint.export.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mmscale\[sentence-transformers\]'"):
        require_exportable(what.config, "sentence_transformers", what.out)
