"""Named sets in a run: logged, told, and what its best checkpoint is chosen by."""

import pytest

from mmscale.checkpoint.resume import open_trained
from mmscale.data.scenes import SHAPES
from tests.whole.small_run import (
    ALONE,
    deepspeed,
    metrics,
    succeed,
    torchrun,
    words_for,
    write_settings,
)


def test_the_best_checkpoint_is_chosen_by_a_named_set(synthetic, tmp_path):
    folder = tmp_path / "run"
    shapes = tmp_path / "shapes.txt"
    shapes.write_text("\n".join(SHAPES), "utf-8")
    more = [
        f"eval.sets={{again: {{data: {synthetic.val}}}, other: {{data: {synthetic.test}}}}}",
        f"eval.sets.shapes={{data: {synthetic.val}, kind: classes, classes: {shapes}}}",
        "eval.sets.shapes.templates=simple",
        "checkpoint.best=eval/other/mean",
        "eval.every=2 steps",
        "checkpoint.every=null",
        "checkpoint.keep=1",
        "train.duration=6 steps",
        f"run.dir={folder}",
    ]
    done = succeed([*ALONE, *words_for(synthetic, write_settings(tmp_path)), *more])
    lines = [line for line in metrics(folder) if "eval/mean" in line and "finished" not in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        own = {name: value for name, value in line.items() if name.startswith("eval/")}
        for name, value in own.items():
            if name.count("/") == 1:
                assert own[name.replace("eval/", "eval/again/")] == value
    best = max(lines, key=lambda line: line["eval/other/mean"])
    chosen = open_trained(folder)
    assert (chosen.state.best.metric, chosen.state.step) == ("eval/other/mean", best["step"])
    assert f"step 6, other: R@1/5/10 image to text {lines[-1]['eval/other/i2t_r1']:.1f}" in (
        done.stderr
    )
    named = {
        name.rpartition("/")[2]: value for name, value in lines[-1].items() if "/shapes/" in name
    }
    assert named.keys() == {"top1", "top5", "mean_per_class", "images", "classes"}
    assert f"shapes: top1 {named['top1']:.1f}, top5 {named['top5']:.1f}" in done.stderr


@pytest.mark.slow
def test_sharded_weights_measure_every_set_as_whole_ones_do(synthetic, tmp_path):
    shapes = tmp_path / "shapes.txt"
    shapes.write_text("\n".join(SHAPES), "utf-8")
    kind = "kind: classes, templates: simple"
    words = [
        *words_for(synthetic, write_settings(tmp_path)),
        f"eval.sets={{other: {{data: {synthetic.test}}}}}",
        f"eval.sets.shapes={{data: {synthetic.val}, classes: {shapes}, {kind}}}",
        "eval.batch_size=7",
        "train.duration=2 steps",
    ]
    ways = {"alone": ALONE, "fsdp": torchrun(), "zero3": deepspeed()}
    found = {}
    for name, launcher in ways.items():
        more = ["engine.deepspeed=zero3"] if name == "zero3" else []
        succeed([*launcher, *words, *more, f"run.dir={tmp_path / name}"])
        (line,) = [line for line in metrics(tmp_path / name) if line.get("finished")]
        found[name] = {key: value for key, value in line.items() if key.startswith("eval/")}
    assert {"eval/mean", "eval/other/mean", "eval/shapes/top1"} <= found["alone"].keys()
    assert found["fsdp"] == found["zero3"] == found["alone"]
