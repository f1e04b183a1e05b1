"""Keys and ids that several shards use: equal images are one, others keep their own identity."""

import io
import json
import os
import tarfile
from itertools import islice

import pytest
from PIL import Image

from mmscale.config.load import load_config
from mmscale.data.index import IndexSettings, index
from mmscale.data.manifest import read_manifest, sealed
from mmscale.data.reader import SampleReader
from mmscale.data.resampled import plan_resampling
from mmscale.data.shards import open_shards, open_train
from mmscale.data.verify import verify
from mmscale.errors import DataError


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, samples):
    """A tar of (key, picture's number, caption, json) samples."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, number, caption, fields in samples:
            members = [("png", picture(number)), ("txt", caption.encode())]
            if fields is not None:
                members.append(("json", json.dumps(fields).encode()))
            for ending, content in members:
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def indexed(folder, shards, **options):
    for number, samples in enumerate(shards):
        write(folder / f"{number}.tar", samples)
    skipped, told = [], []
    options |= {"skipped": skipped.append, "tell": told.append}
    manifest = index(sorted(folder.glob("*.tar")), **options)
    return manifest, skipped, told


def ids(manifest):
    return [identity for shard in manifest.shards for identity in shard.identities.images]


@pytest.mark.parametrize("with_ids", [False, True])
def test_keys_that_begin_anew_are_other_images(tmp_path, with_ids):
    """Also where the samples bring ids that begin anew with them."""
    shards = [
        [
            (f"{n:05d}", 100 * s + n, f"shard {s} {n}", {"image_id": n} if with_ids else None)
            for n in range(20)
        ]
        for s in range(3)
    ]
    manifest, skipped, told = indexed(tmp_path / "s", shards)
    assert (manifest.samples, skipped) == (60, [])
    assert len(set(ids(manifest))) == 60
    assert any("40 samples bear the key or id of another image" in line for line in told)
    opened = open_shards("data.eval", str(tmp_path / "s"))
    reader = SampleReader(opened)
    read = [reader.read(s, n).image_id for s in range(3) for n in range(20)]
    reader.close()
    assert read == ids(manifest)
    assert verify(tmp_path / "s") == []
    # The first shard keeps what it has.
    alone, _, _ = indexed(tmp_path / "alone", shards[:1])
    assert ids(alone) == ids(manifest)[:20]


def test_only_equal_content_is_left_out(tmp_path):
    first = [("a", 1, "one", None), ("b", 2, "two", None), ("c", 3, "three", None)]
    second = [("a", 1, "one", None), ("b", 2, "another", None), ("c", 4, "three", None)]
    manifest, skipped, _ = indexed(tmp_path / "s", [first, second])
    a, b, c, again_b, other_c = ids(manifest)
    assert manifest.samples == 5
    assert again_b == b, "the same picture with another caption is the same image"
    assert len({a, b, c, other_c}) == 4
    assert skipped == ["1.tar: sample a its key is in 0.tar too, with the same image and captions"]
    assert verify(tmp_path / "s") == []


def test_ids_of_one_source_join_samples_of_several_shards(tmp_path):
    """A set with a caption a sample says by its ids which samples are of one image."""
    first = [("a0", 1, "one", {"image_id": 7}), ("a1", 2, "two", {"image_id": 7})]
    second = [
        ("a2", 3, "three", {"image_id": 7}),
        ("x", 4, "x", {"image_id": 7, "source": "other"}),
    ]
    manifest, _, _ = indexed(tmp_path / "s", [first, second])
    assert ids(manifest)[:3] == [7, 7, 7]
    assert ids(manifest)[3] != 7


def test_a_folder_of_the_same_again_is_refused(tmp_path):
    shard = [(f"{n:05d}", n, f"picture {n}", None) for n in range(20)]
    with pytest.raises(DataError, match=r"40 of 60 samples.*its key is in 0\.tar too"):
        indexed(tmp_path / "s", [shard] * 3)
    assert not (tmp_path / "s" / "manifest.json").exists()
    manifest, skipped, _ = indexed(tmp_path / "s", [shard] * 3, settings=IndexSettings(1))
    assert manifest.samples == 20
    assert len(skipped) == 6
    assert skipped[-1].startswith("35 more samples like it")


def test_without_a_manifest_keys_count_in_their_shard(tmp_path):
    for number in range(3):
        samples = [(f"{n:05d}", 20 * number + n, f"shard {number} {n}", None) for n in range(20)]
        write(tmp_path / "s" / f"{number}.tar", samples)
    config = load_config(["demo", f"data.train={tmp_path / 's'}", "data.resampled=true"])
    lanes = plan_resampling(config.data, open_train(config.data)).lanes(4, 150, 4, 0, 0)
    ids = {}
    for lane in lanes:
        for item in islice(lane.items(), 150):
            ids.setdefault(item.content.captions, set()).add(item.content.image_id)
    assert len(ids) == 60
    assert all(len(own) == 1 for own in ids.values()), "one id whenever its shard is drawn"
    assert len(set.union(*ids.values())) == 60


def test_copies_are_counted_and_told_with_the_words_that_join_them(tmp_path):
    shard = [(f"{n:05d}", n // 5, f"picture {n // 5} side {n}", None) for n in range(100)]
    manifest, skipped, told = indexed(tmp_path / "s", [shard[:50], shard[50:]])
    assert (manifest.copies, skipped) == (80, [])
    (line,) = told
    assert "80 of 100 images have the bytes of another" in line
    assert "data.match=caption" in line
    assert read_manifest(tmp_path / "s").copies == 80
    joined = {i for shard in manifest.shards for i in shard.identities.captions}
    assert len(joined) == 20


def test_a_manifest_may_lie_elsewhere(tmp_path):
    shard = [(f"{n:05d}", n, f"picture {n}", None) for n in range(4)]
    write(tmp_path / "ro" / "0.tar", shard)
    write(tmp_path / "ro" / "1.tar", [(f"x{key}", *rest) for key, *rest in shard])
    index(sorted((tmp_path / "ro").glob("*.tar")), out=tmp_path / "index")
    assert not (tmp_path / "ro" / "manifest.json").exists()
    opened = open_train(load_config(["demo", f"data.train={tmp_path / 'index'}"]).data)
    assert opened.paths == (tmp_path / "ro" / "0.tar", tmp_path / "ro" / "1.tar")
    assert verify(tmp_path / "index") == []
    config = load_config(["demo", f"data.train={tmp_path / 'index'}", "data.resampled=true"])
    assert open_train(config.data).paths == opened.paths
    reader = SampleReader(opened)
    assert reader.read(1, 3).captions == ("picture 3",)
    reader.close()
    (tmp_path / "ro" / "1.tar").unlink()
    assert any("1.tar" in fault for fault in verify(tmp_path / "index"))
    (tmp_path / "ro").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="which is no folder here; mount it, or run mmscale index"):
        open_shards("data.train", str(tmp_path / "index"))


@pytest.mark.parametrize(
    "place", ["pipe:touch {canary}", "https://127.0.0.1:9/x", "|touch {canary}"]
)
def test_a_manifest_cannot_name_commands_or_addresses(tmp_path, place):
    write(tmp_path / "s" / "0.tar", [("a", 1, "one", None)])
    index([tmp_path / "s" / "0.tar"])
    path = tmp_path / "s" / "manifest.json"
    content = json.loads(path.read_text())
    content["shards_in"] = place.format(canary=tmp_path / "canary")
    path.write_bytes(sealed(content))
    data = load_config(["demo", f"data.train={tmp_path / 's'}"]).data
    for allowed in (False, True):
        with pytest.raises(DataError, match="which is no folder here"):
            open_train(data.model_copy(update={"allow_pipe": allowed}))
    assert not (tmp_path / "canary").exists()


def test_a_pipe_in_a_shards_place_is_not_opened(tmp_path):
    write(tmp_path / "s" / "0.tar", [("a", 1, "one", None)])
    index([tmp_path / "s" / "0.tar"], out=tmp_path / "index")
    (tmp_path / "s" / "0.tar").unlink()
    os.mkfifo(tmp_path / "s" / "0.tar")
    with pytest.raises(DataError, match=r"0\.tar"):
        open_shards("data.train", str(tmp_path / "index"))
