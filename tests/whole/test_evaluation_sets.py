"""Named sets in a run: logged, told, and what its best checkpoint is chosen by."""

from mmscale.checkpoint.resume import open_trained
from mmscale.data.scenes import SHAPES
from tests.whole.small_run import ALONE, metrics, succeed, words_for, write_settings


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
