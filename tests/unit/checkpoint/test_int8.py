"""Graphs in int8, and what is said of their cost, against onnxruntime and the model itself."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from mmscale.checkpoint.export import export
from mmscale.cli import app
from mmscale.data.shards import open_shards
from mmscale.errors import ConfigError
from mmscale.evaluation.quantised import cost_lines, cost_on_pairs, cost_on_sample
from mmscale.evaluation.trained import Transform
from mmscale.model.dual_encoder import Tokenizer
from tests.unit.checkpoint.test_export import TIMM, exported
from tests.unit.model.tiny import save_bert
from tests.whole.test_export import photographs

onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")


def recall_at_1(queries, candidates, wanted):
    """Share of queries, in percent, whose nearest candidate is one of theirs."""
    nearest = (queries @ candidates.T).argmax(1)
    return 100 * np.mean(
        [place in own for place, own in zip(nearest.tolist(), wanted, strict=True)]
    )


@pytest.mark.slow
def test_the_cost_of_int8_is_that_of_the_graphs_that_are_written(synthetic, tmp_path):
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random"}
    what = exported(tmp_path / "out", {"vision": TIMM, "text": bert, "embed_dim": 16})
    shards = open_shards("--data", str(synthetic.val))
    export(replace(what, int8=cost_on_pairs(what.config, what.spec, shards)), "onnx")
    cost = json.loads((what.out / "mmscale.json").read_text())["int8"]
    assert {path.suffix for path in what.out.iterdir()} == {".onnx", ".json"}
    assert (cost["images"], cost["captions"]) == (24, 120)

    import onnx

    sessions = {}
    for name in ("image", "text"):
        kinds = {
            onnx.TensorProto.DataType.Name(tensor.data_type)
            for tensor in onnx.load(what.out / f"{name}.onnx").graph.initializer
        }
        assert "INT8" in kinds
        sessions[name] = onnxruntime.InferenceSession(what.out / f"{name}.onnx")
    pixels = torch.stack([Transform(what.spec)(image) for image, _ in photographs(synthetic.val)])
    image = torch.from_numpy(sessions["image"].run(None, {"pixels": pixels.numpy()})[0])
    with torch.no_grad():
        ours = what.encoder.encode_image(pixels, normalize=True)
    # Ranges are those of a whole batch: here one of all pictures, as the measurement has it.
    assert cost["image_difference"] == pytest.approx(float((image - ours).abs().max()), rel=0.02)
    assert cost["image_difference"] > 1e-4
    assert 1e-4 < cost["text_difference"] < 0.2
    assert torch.isfinite(normalize(image)).all()

    table = {kind: {n: r[kind] for n, r in cost["recall"].items()} for kind in ("fp32", "int8")}
    captions = captions_of(synthetic.val)
    owners = [place for place, own in enumerate(captions) for _ in own]
    tokens = Tokenizer(what.spec)([caption for own in captions for caption in own])
    with torch.no_grad():
        rows = what.encoder.encode_text(tokens, normalize=True)
    wanted = [[row for row, owner in enumerate(owners) if owner == place] for place in range(24)]
    assert table["fp32"]["i2t_r1"] == pytest.approx(recall_at_1(ours, rows, wanted))
    assert table["fp32"]["t2i_r1"] == pytest.approx(recall_at_1(rows, ours, [[o] for o in owners]))
    assert len(cost_lines(cost)) == 7


def captions_of(packed):
    """Captions of each image, in the shards' order."""
    found = []
    for shard in sorted(packed.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = [member for member in tar if member.name.endswith(".json")]
            found += [json.loads(tar.extractfile(each).read())["captions"] for each in members]
    return found


def test_without_pairs_the_difference_on_a_sample_is_told(tmp_path):
    bert = {"name": f"hf:{save_bert(tmp_path / 'bert')}", "weights": "random"}
    what = exported(tmp_path / "out", {"vision": TIMM, "text": bert, "embed_dim": 16})

    def call(shift):
        return lambda mode, *rows: torch.full((2, 16), shift * (1 if mode == "image" else 2))

    cost = cost_on_sample(what)(call(0.0), call(0.25))
    assert cost["image_difference"] == 0.25
    assert cost["text_difference"] == 0.5
    assert cost_lines(cost) == [
        "int8: unit rows differ by at most 0.2500 (images) and 0.5000 (captions)"
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "clip", "--int8"], "--int8 --to clip: only onnx has it"),
        (["--to", "onnx", "--data", "x"], "--data x: only --int8 measures something on it"),
    ],
)
def test_options_that_have_no_effect_are_refused(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        app(
            ["export", str(tmp_path), "--out", str(tmp_path / "out"), *words], standalone_mode=False
        )
