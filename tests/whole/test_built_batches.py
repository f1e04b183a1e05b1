"""Hard batches from a run's own embeddings, going on without the file that they were drawn from."""

import json
import shutil

import pytest

from mmscale.checkpoint.files import Checkpoint, step_folder
from mmscale.contracts import World
from mmscale.data.arrange import Neighbours, mean_by_image, nearest
from mmscale.data.shards import open_shards
from mmscale.evaluation.retrieval import embed_set
from mmscale.evaluation.trained import load_trained
from mmscale.parallel.peers import connect
from tests.whole.command import run
from tests.whole.small_run import (
    ALONE,
    course,
    succeed,
    torchrun,
    training_lines,
    words_for,
    write_settings,
)


@pytest.mark.slow
def test_hard_batches_resume_with_the_table_they_started_with(synthetic, tmp_path):
    settings = words_for(synthetic, write_settings(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    succeed([*ALONE, *settings, f"run.dir={first}", "train.duration=2 steps"])
    table = tmp_path / "embeddings.npz"
    succeed(["mmscale", "embed", first, "--data", synthetic.train, "--out", table])
    words = [
        *settings,
        f"run.dir={second}",
        f"data.hard_batches.table={table}",
        "data.hard_batches.window=3",
        "data.match=caption",
        "data.positive_share=0",
        "data.caption_cleaning=whitespace",
        f"data.decoded_cache={tmp_path / 'decoded'}",
        "model.text.context_length=26",
        "train.duration=8 steps",
        "checkpoint.every=4 steps",
    ]
    done = succeed([*ALONE, *words])
    straight = course(second)
    assert straight.keys() == set(range(1, 9))
    assert straight[1][1] != course(first)[1][1]
    cut = [line["captions_cut"] for line in training_lines(second)]
    assert all(0 < share < 1 for share in cut)
    assert "were cut" in done.stderr
    # From the checkpoint in the middle, on two ranks, without the file.
    shutil.rmtree(second / "checkpoints" / "step-00000008")
    table.unlink()
    succeed([*torchrun(), *words])
    again = course(second)
    assert again.keys() == straight.keys()
    for step, (loss, digest) in straight.items():
        assert again[step][1] == digest
        assert again[step][0] == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_a_stage_takes_the_hard_batches_that_its_own_model_finds(synthetic, tmp_path):
    hard = {"table": "self", "by": "text", "window": 3, "share": 0.5}
    stages = [
        {"name": "easy", "duration": "3 steps"},
        {"name": "hard", "duration": "6 steps", "data": {"hard_batches": hard}},
    ]
    folder = tmp_path / "run"
    words = [
        *words_for(synthetic, write_settings(tmp_path)),
        f"run.dir={folder}",
        f"stages={json.dumps(stages)}",
        "train.duration=9 steps",
        "checkpoint.every=3 steps",
    ]
    done = succeed([*ALONE, *words])
    assert "neighbours by the model as it is now" in done.stderr
    straight = course(folder)
    kept = Neighbours.of(Checkpoint(step_folder(folder, 6)).tensors_of("hard_batches"))
    pairs = embed_set(
        load_trained(step_folder(folder, 3)),
        open_shards("data.train", str(synthetic.train)),
        connect(World()),
    )
    found = nearest(mean_by_image(pairs.text, pairs.text_ids, pairs.image_ids), pairs.image_ids)
    assert (kept.image_ids == found.image_ids).all()
    assert (kept.rows[:, 0] == found.rows[:, 0]).mean() > 0.95, "fp32 noise alone"
    # From the middle of the stage on: the table of its beginning, not of the model there.
    shutil.rmtree(step_folder(folder, 9))
    again = succeed([*ALONE, *words])
    assert "neighbours by the model as it is now" not in again.stderr
    assert course(folder) == straight


@pytest.mark.slow
def test_a_table_that_is_not_there_is_named(synthetic, tmp_path):
    settings = words_for(synthetic, write_settings(tmp_path))
    words = [f"run.dir={tmp_path / 'run'}", f"data.hard_batches.table={tmp_path / 'none.npz'}"]
    done = run([*ALONE, *settings, *words])
    assert done.returncode == 4
    assert "data.hard_batches.table" in done.stderr
    assert "none.npz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_plan_refuses_batches_that_cannot_be_built(synthetic, tmp_path):
    settings = words_for(synthetic, write_settings(tmp_path))
    words = ["data.captions=flat", "data.positive_share=0", "train.global_batch_size=240"]
    done = run(["mmscale", "plan", *settings, *words])
    assert done.returncode == 2, json.dumps(done.stderr)
    assert "data.positive_share=0" in done.stderr
