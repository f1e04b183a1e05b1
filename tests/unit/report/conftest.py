import base64
import io
import math

import pytest
import torch
from PIL import Image

from mmscale.diagnostics.pairs import one_to_one
from mmscale.diagnostics.space import snapshot
from mmscale.report.examples import (
    PICTURE_PREFIX,
    Answer,
    Doubt,
    Examples,
    Found,
    Photo,
    Point,
    SharedCaption,
    Twins,
)
from tests.unit.diagnostics.faulty_embeddings import healthy


@pytest.fixture
def histograms():
    """Similarity histograms as an evaluation leaves them."""
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    return {
        "matched": {"edges": edges, "counts": [0, 1, 4, 5]},
        "unmatched": {"edges": edges, "counts": [3, 40, 42, 5]},
        "width": 64,
        "images": 10,
        "captions": 50,
    }


@pytest.fixture
def run_lines():
    """The metric lines of a short finished run."""
    lines = []
    for step in range(1, 41):
        lines.append(
            {
                "step": step,
                "samples": 32 * step,
                "loss": 3.4 * math.exp(-step / 20),
                "loss_chance": 3.47,
                "loss/infonce": 2.4 * math.exp(-step / 20),
                "loss/infonce_floor": 0.1,
                "loss/infonce_chance": 3.47,
                "loss/vicreg": 1.0,
                "loss/vicreg_weight": 0.5,
                "lr": 1e-3 / step,
                "logit_scale": 14 + step / 10,
                "grad_norm": 1.2,
                "grad_norm_vision": 1.0 + step % 3,
                "grad_norm_text": 0.5,
                "samples_per_second": 64.0,
                "data_wait": 0.1,
                "keys_digest": "00ff",
            }
        )
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "health/std_image": 0.1,
                    "health/std_text": 0.2,
                    "health/gap": 1 / step,
                }
            )
            recalls = {f"eval/{way}_r{k}": step + k for way in ("i2t", "t2i") for k in (1, 5, 10)}
            lines.append({"step": step, **recalls, "eval/images": 10, "eval/captions": 50})
    return [*lines, {"finished": True, "step": 40}]


@pytest.fixture
def space():
    """Moments of a space of eight pairs."""
    pairs = one_to_one(healthy(0.7)(8, 16, 0))
    return [{"step": step, **snapshot(pairs)} for step in (10, 40)]


@pytest.fixture
def make_examples():
    """Examples of the eight pairs of `space`, with any caption and key."""

    def make(caption="a dog", key="dog"):
        file = io.BytesIO()
        Image.new("RGB", (8, 6), "red").save(file, "WEBP")
        picture = PICTURE_PREFIX + base64.b64encode(file.getvalue()).decode()
        photos = {
            int(number): Photo(id=number, key=key, picture=picture if number else None)
            for number in torch.arange(8)
        }
        right = Found(photo=1, caption=caption, similarity=0.5, right=True)
        wrong = Found(photo=2, caption=caption, similarity=0.4, right=False)
        common = {"photo": 1, "caption": caption, "similarity": 0.5}
        image = Answer(way="i2t", rank=1, found=(right, wrong), **common)
        text = Answer(
            way="t2i", rank=7, found=(wrong.model_copy(update={"caption": None}),), **common
        )
        return Examples(
            photos=photos,
            points=tuple(Point(photo=number, caption=caption) for number in photos),
            best=(image,),
            worst=(text,),
            doubts=(Doubt(photo=3, caption=caption, similarity=0.1, suggested=0.6),),
            num_doubts=1,
            twins=(Twins(photos=(4, 5)),),
            shared=(SharedCaption(caption=caption, photos=(6, 7)),),
            num_shared=1,
        )

    return make
