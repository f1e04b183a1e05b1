"""What a model card says of where things lie."""

from pathlib import Path

import pytest

from mmscale.config.data import SourceConfig
from mmscale.report.card import public_name


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("hf:openai/clip-vit-base-patch32", "hf:openai/clip-vit-base-patch32"),
        ("timm:test_vit", "timm:test_vit"),
        ("shards/flickr30k/train", "shards/flickr30k/train"),
        ("/data/flickr30k/train", "flickr30k/train"),
        (f"{Path.home()}/train", "train"),
        ("~/train", "train"),
        ("hf:/models/bert", "hf:models/bert"),
        ("openclip:local-dir:/models/clip", "openclip:models/clip"),
        ("https://me:secret@host/a/{0..9}.tar?token=x", "https://host/a/{0..9}.tar"),
        ("pipe:aws s3 cp s3://bucket/key -", "a command's output"),
        (["/a/b/c", "d"], "b/c, d"),
        ([SourceConfig(shards="/a/b/c", weight=2)], "b/c"),
    ],
)
def test_a_name_without_its_place(value, told):
    assert public_name(value) == told
