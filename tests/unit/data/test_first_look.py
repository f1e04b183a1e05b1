"""What is told of the data before a run begins, from its manifests alone."""

import json
import shutil
import tarfile

import pytest

from mmscale.config.data import DataConfig
from mmscale.data.first_look import first_look
from mmscale.data.index import index
from mmscale.data.manifest import read_manifest
from mmscale.data.shards import open_shards, open_train
from tests.unit.data.tars import add


def write(folder, captions, shards=2):
    """An image a list of captions; their bytes are their numbers'."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(captions), shards):
                add(tar, f"{number:05d}.jpg", f"image {number}".encode())
                add(tar, f"{number:05d}.json", json.dumps({"captions": captions[number]}).encode())
    index(sorted(folder.glob("*.tar")))
    return str(folder)


def looked(match, train, **held_out):
    sets = {name: open_shards(name, where) for name, where in held_out.items()}
    return list(first_look(match, open_shards("data.train", train), sets))


def test_captions_that_stand_at_several_images_are_counted(tmp_path):
    captions = [[f"word{n} at {m}" for m in range(3)] for n in range(100)]
    captions[7][1] = "A Dog, running"
    captions[40][0] = captions[41][2] = "a dog running."
    where = write(tmp_path / "s", captions)
    (line,) = looked("image", where)
    assert line.startswith("data.train: 3 of 100 images share a caption")
    assert "unless data.match=caption" in line
    assert looked("caption", where) == []


def test_a_few_such_captions_are_not_worth_a_line(tmp_path):
    captions = [[f"word{n}"] for n in range(300)]
    captions[1] = captions[2]
    assert looked("image", write(tmp_path / "s", captions)) == []


def test_captions_of_one_image_under_several_keys_are_no_negatives(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(20):
            add(tar, f"{number}.jpg", f"image {number // 2}".encode())
            fields = {"captions": [f"word{number // 2}"], "image_id": number // 2}
            add(tar, f"{number}.json", json.dumps(fields).encode())
    index([folder / "0.tar"])
    assert looked("image", str(folder)) == []


@pytest.fixture
def both(tmp_path):
    """Two shards that are trained on, one of which is evaluated on from another folder."""
    train = write(tmp_path / "train", [[f"word{n}"] for n in range(20)])
    (tmp_path / "eval").mkdir()
    shutil.copy(tmp_path / "train" / "1.tar", tmp_path / "eval" / "x.tar")
    index([tmp_path / "eval" / "x.tar"])
    return train, str(tmp_path / "eval"), tmp_path / "mask"


def _eval_of(both, **data):
    train = open_train(DataConfig(train=both[0], **data))
    return list(first_look("image", train, {"data.eval": open_shards("data.eval", both[1])}))


@pytest.mark.parametrize("is_resampled", [False, True])
def test_images_that_are_evaluated_on_too_are_counted_wherever_they_lie(both, is_resampled):
    """Without a record of what is trained on, only a shard at the same place is known."""
    if is_resampled:
        both = (both[0], both[0] + "/1.tar", both[2])
    (line,) = _eval_of(both, resampled=is_resampled)
    assert line == (
        "data.eval: 10 of its 10 images are in data.train too; recalls and verdicts are not of "
        "held-out pairs"
    )
    ids = read_manifest(both[2].parent / "train").shards[1].identities.images
    both[2].write_text(json.dumps(list(ids)[:7]))
    (line,) = _eval_of(both, resampled=is_resampled, mask=str(both[2]))
    assert line.startswith("data.eval: 3 of its 10 images")
    both[2].write_text(json.dumps(list(ids)))
    assert _eval_of(both, resampled=is_resampled, mask=str(both[2])) == []
