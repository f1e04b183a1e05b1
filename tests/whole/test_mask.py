"""A run without some images is the run over shards packed without them, also when it goes on."""

import json
import random
import shutil

import pytest

from mmscale.data.manifest import read_manifest
from mmscale.data.mask import write_mask
from tests.unit.data.test_mask import digest_of, reduced
from tests.whole.command import run
from tests.whole.small_run import ALONE, course, succeed, torchrun, write_settings

EVERY = "checkpoint.every=4 steps"
PAIRS = ["data.shuffle_buffer=20", EVERY]


@pytest.fixture(scope="module")
def mask(synthetic, tmp_path_factory):
    """A mask of a fifth of the pairs, and a folder packed without them."""
    base = tmp_path_factory.mktemp("mask")
    shards = read_manifest(synthetic.train).shards
    ids = [image for shard in shards for image in shard.identities.images]
    chosen = random.Random(0).sample(ids, len(ids) // 5)
    write_mask(base / "mask.json", {digest_of(synthetic.train): chosen})
    return base / "mask.json", reduced(synthetic.train, base / "less", ids=chosen)


@pytest.fixture(scope="module")
def words(synthetic, mask, tmp_path_factory):
    settings = str(write_settings(tmp_path_factory.mktemp("settings")))
    return [settings, f"data.train={synthetic.train}", f"data.mask={mask[0]}", *PAIRS]


@pytest.fixture(scope="module")
def less(words, mask, tmp_path_factory):
    """The course of a run over the shards that were packed without the images."""
    folder = tmp_path_factory.mktemp("less") / "run"
    given = [words[0], f"data.train={mask[1]}", *PAIRS]
    succeed([*ALONE, *given, f"run.dir={folder}", "train.duration=12 steps"])
    return course(folder)


@pytest.mark.slow
def test_a_masked_run_goes_on_as_the_run_that_never_had_the_images(words, mask, less, tmp_path):
    """Seven steps, in the middle of an epoch, then the rest with the mask in another place."""
    folder, place = tmp_path / "run", tmp_path / "moved.json"
    done = succeed([*ALONE, *words, f"run.dir={folder}", "train.duration=7 steps"])
    assert "images of data.train" in done.stderr
    assert f"data.mask={mask[0]}: leaves out " in done.stderr
    shutil.copy(mask[0], place)
    moved = [f"data.mask={place}" if word.startswith("data.mask=") else word for word in words]
    more = [*ALONE, *moved, f"run.dir={folder}", "train.duration=12 steps"]
    succeed(more)
    assert course(folder) == less

    # The same file with one id less is another run.
    content = json.loads(place.read_text())
    content["masked"] = {name: ids[1:] for name, ids in content["masked"].items()}
    place.write_text(json.dumps(content))
    refused = run([*more[:-1], "train.duration=14 steps"])
    assert refused.returncode == 2
    assert f"data.mask={place} leaves out other images than it did when " in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_two_ranks_leave_out_the_same_images(words, less, tmp_path):
    folder = tmp_path / "run"
    for steps in (7, 12):
        succeed([*torchrun(), *words, f"run.dir={folder}", f"train.duration={steps} steps"])
    found = course(folder)
    assert [keys for _, keys in found.values()] == [keys for _, keys in less.values()]
    assert [loss for loss, _ in found.values()] == pytest.approx(
        [loss for loss, _ in less.values()], rel=1e-4
    )
