"""Runs with compiled blocks: the losses of the library's blocks, on one process and on two."""

import json

import pytest

from tests.whole.command import explain, run
from tests.whole.small_run import (
    ALONE,
    deepspeed,
    torchrun,
    training_lines,
    words_for,
    write_settings,
)

VIT = {
    "name": "timm:vit_tiny_patch16_224",
    "weights": "random",
    "options": {"depth": 2, "img_size": 32, "patch_size": 8},
}


@pytest.mark.slow
def test_compiled_blocks_train_alike_alone_and_sharded(synthetic, tmp_path):
    settings = write_settings(tmp_path)
    text = settings.read_text("utf-8").split("  vision:")[0]
    rest = settings.read_text("utf-8").split("  text:")[1]
    settings.write_text(f"{text}  vision: {json.dumps(VIT)}\n  text:{rest}", "utf-8")
    words = [*words_for(synthetic, settings), "train.duration=4 steps", "train.micro_batch_size=4"]
    losses = {}
    for name, launcher, choice in (
        ("plain", ALONE, "off"),
        ("compiled", ALONE, "blocks"),
        ("sharded", torchrun(), "blocks"),
    ):
        folder = tmp_path / name
        done = run(
            [*launcher, *words, f"engine.compile={choice}", f"run.dir={folder}"], timeout=400
        )
        assert done.returncode == 0, explain(done)
        assert ("compiled when first called" in done.stdout + done.stderr) == (choice == "blocks")
        losses[name] = [(x["loss"], x["grad_norm"]) for x in training_lines(folder)]
    for name in ("compiled", "sharded"):
        for mine, theirs in zip(losses[name], losses["plain"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_compiled_blocks_under_zero_3_are_refused(synthetic, tmp_path):
    words = [*words_for(synthetic, write_settings(tmp_path)), f"run.dir={tmp_path / 'run'}"]
    words += ["engine.compile=blocks", "engine.deepspeed=zero3"]
    done = run([*deepspeed(), *words], timeout=200)
    assert done.returncode == 2, explain(done)
    assert "engine.compile=blocks under ZeRO-3" in done.stderr
