"""A trained run, loaded in Python and exported by the command, gives what `mmscale embed` wrote."""

import io
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import SiglipModel

import mmscale
from tests.unit.model.whole_hf import save_whole
from tests.whole.command import run
from tests.whole.small_run import (
    ALONE,
    SETTINGS,
    course,
    metrics,
    succeed,
    training_lines,
    words_for,
)

# Of the small run without its towers.
REST = SETTINGS[SETTINGS.index("train:") :]


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS.replace("timm:convnext_atto", "timm:test_convnext"), "utf-8")
    text = settings.read_text("utf-8")
    settings.write_text(text.replace("options: {depths: [1, 1, 1, 1], dims: [16, 32, 48, 64]}", ""))
    words = words_for(synthetic, settings)
    succeed([*ALONE, *words, f"run.dir={folder / 'run'}", "train.duration=3 steps"])
    return folder / "run"


def photographs(packed: Path) -> list[tuple[Image.Image, str]]:
    """Image and first caption of each sample, read as any tar is."""
    pairs = {}
    for shard in sorted(packed.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                content = tar.extractfile(member).read()
                pairs.setdefault(key, {})[suffix] = content
    return [(Image.open(io.BytesIO(p["jpg"])), p["txt"].decode()) for p in pairs.values()]


def test_load_and_export_agree_with_embed(trained, synthetic, tmp_path):
    npz = tmp_path / "pairs.npz"
    succeed(["mmscale", "embed", trained, "--data", synthetic.val, "--out", npz])
    stored = np.load(npz)
    model, transform, tokenizer = mmscale.load(trained)
    images, captions = zip(*photographs(Path(synthetic.val)), strict=True)
    pixels = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        rows = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokenizer(captions), normalize=True).numpy()
    np.testing.assert_allclose(rows, stored["image"], atol=1e-5)
    first = [np.flatnonzero(stored["text_ids"] == identity)[0] for identity in stored["image_ids"]]
    np.testing.assert_allclose(texts, stored["text"][first], atol=1e-5)

    out = tmp_path / "open_clip"
    succeed(["mmscale", "export", trained, "--to", "open_clip", "--out", out])
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs.eval()
    with torch.no_grad():
        same = theirs.encode_image(pixels, normalize=True).numpy()
        own = theirs.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
    np.testing.assert_allclose(same, rows, atol=1e-5)
    # With each side's own decoding and resizing.
    np.testing.assert_allclose(own.numpy(), rows, atol=1e-3)


def test_export_refuses_an_unknown_format_and_a_missing_run(trained, tmp_path):
    done = run(["mmscale", "export", trained, "--to", "tflite", "--out", tmp_path / "out"])
    assert done.returncode == 2
    assert "open_clip, hf, onnx, sentence_transformers, adapter" in done.stderr
    done = run(["mmscale", "export", tmp_path / "none", "--to", "onnx", "--out", tmp_path / "out"])
    assert done.returncode == 2
    assert "no such run" in done.stderr


def test_a_run_with_adapters_is_loaded_and_exported_whole(trained, synthetic, tmp_path):
    """It begins on another run's weights, of which it moves none."""
    settings = tmp_path / "settings.yaml"
    settings.write_text((trained.parent / "settings.yaml").read_text("utf-8"))
    adapter = "{kind: lora, rank: 2, alpha: 32, dropout: 0.1}"
    succeed(
        [
            *ALONE,
            *words_for(synthetic, settings),
            f"run.dir={tmp_path / 'run'}",
            "train.duration=3 steps",
            f"model.weights={trained}",
            f"model.text.adapter={adapter}",
            "model.vision.frozen=true",
            "loss.terms=[{kind: infonce}, {kind: matryoshka, widths: [16]}]",
        ]
    )
    evaluated = [line for line in metrics(tmp_path / "run") if "eval/i2t_r1" in line][-1]
    recalls = [name for name in evaluated if name.endswith("_r10")]
    assert {f"{name}@16" for name in recalls} <= set(evaluated)
    assert "eval/images@16" not in evaluated
    model, _, tokenizer = mmscale.load(tmp_path / "run")
    tokens = tokenizer(["a red circle", "two squares"])
    with torch.no_grad():
        rows = model.encode_text(tokens)
    kept = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.model.text.state_dict().items()
        if ".lora_" not in name
    }
    before = mmscale.load(trained)[0].model.text.state_dict()
    assert [name for name in before if not torch.equal(kept[name], before[name])] == []
    assert any(".lora_" in name for name in model.model.text.state_dict())
    out = tmp_path / "open_clip"
    succeed(["mmscale", "export", tmp_path / "run", "--to", "open_clip", "--out", out])
    theirs = open_clip.create_model(f"local-dir:{out}").eval()
    padded = torch.nn.functional.pad(tokens, (0, theirs.context_length - tokens.shape[1]))
    with torch.no_grad():
        got = theirs.encode_text(padded, normalize=True)
    wanted = torch.nn.functional.normalize(rows, dim=-1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_begins_with_an_export_as_with_the_run_that_it_comes_from(
    trained, synthetic, tmp_path
):
    out = tmp_path / "export"
    succeed(["mmscale", "export", trained, "--to", "open_clip", "--out", out])
    words = [*ALONE, *words_for(synthetic, trained.parent / "settings.yaml")]
    words += ["train.duration=3 steps", "data.eval=null"]
    for name, source in (("of_run", trained), ("of_export", out)):
        succeed([*words, f"run.dir={tmp_path / name}", f"model.weights={source}"])
    before, after = course(tmp_path / "of_run"), course(tmp_path / "of_export")
    assert [digest for _, digest in before.values()] == [digest for _, digest in after.values()]
    losses = [[loss for loss, _ in lines.values()] for lines in (before, after)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    first = course(trained)[1][0]
    assert abs(losses[0][0] - first) > 1e-4, "the export was trained"

    narrow = [f"run.dir={tmp_path / 'narrow'}", f"model.weights={out}", "model.embed_dim=16"]
    done = run([*words, *narrow])
    assert done.returncode == 5, done.stderr
    assert "head.image.layers.0.weight is [32," in done.stderr
    assert "model.head.weights=random" in done.stderr
    done = succeed([*words, *narrow, "model.head.weights=random"])
    assert f"heads are drawn anew, all else is of {out}" in done.stdout + done.stderr
    done = run([*words, f"run.dir={tmp_path / 'x'}", "model.head.weights=random"])
    assert done.returncode == 2, done.stderr
    assert "model.head.weights='random' has an effect only where model.weights names" in done.stderr


@pytest.mark.slow
def test_a_scale_above_100_goes_in_through_a_resume_and_out_again(synthetic, tmp_path):
    source = tmp_path / "siglip"
    model = save_whole(source, "siglip")
    with torch.no_grad():
        model.logit_scale.fill_(4.765)  # SigLIP's own
    model.save_pretrained(source)
    (tmp_path / "settings.yaml").write_text(SETTINGS[: SETTINGS.index("model:")] + REST)
    words = [*ALONE, *words_for(synthetic, tmp_path / "settings.yaml")]
    words += [f"model.preset=hf:{source}", "loss.preset=siglip", "checkpoint.every=2 steps"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed([*words, f"run.dir={whole}", "train.duration=4 steps"])
    for steps in (2, 4):
        succeed([*words, f"run.dir={parts}", f"train.duration={steps} steps"])
    assert course(parts) == course(whole)
    scales = [[line["logit_scale"] for line in training_lines(run)] for run in (whole, parts)]
    assert scales[0] == scales[1]
    assert min(scales[0]) > 100
    assert max(scales[0]) <= np.exp(np.float32(4.765)) * (1 + 1e-6)
    succeed(["mmscale", "export", parts, "--to", "clip", "--out", tmp_path / "out"])
    theirs = SiglipModel.from_pretrained(tmp_path / "out")
    assert float(theirs.logit_scale) == pytest.approx(np.log(mmscale.load(parts)[0].logit_scale()))
    assert float(theirs.logit_scale) > np.log(100)

    done = run([*words, f"run.dir={tmp_path / 'x'}", "model.logit_scale.max=100"])
    assert done.returncode == 2, done.stderr
    assert "a logit scale of 117.3, above model.logit_scale.max=100" in done.stderr
