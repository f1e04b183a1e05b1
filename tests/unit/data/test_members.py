import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmscale.data.damage import DamagedSampleError
from mmscale.data.far import Far
from mmscale.data.forward import read_through
from mmscale.data.index import index
from mmscale.data.members import describe_members, image_id_of
from mmscale.data.reader import SampleReader, parse_sample
from mmscale.data.shards import open_shards
from mmscale.data.tar import TEXT_BYTES, TarSample, walk_shard


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


SAMPLES = {
    "own": {"txt": b"one", "json": b'{"captions": ["two", "three"], "image_id": 7}'},
    "elsewhere": {"txt": "größer".encode(), "json": b'{"url": "http://x", "source": "web"}'},
    "text": {"txt": b"only text"},
    "boolean": {"txt": b"a", "json": b'{"image_id": true}'},
    "negative": {"txt": b"a", "json": b'{"image_id": -1}'},
    "large": {"txt": b"a", "json": json.dumps({"image_id": 2**63}).encode()},
    "empty_list": {"txt": b"a", "json": b'{"captions": []}'},
    "surrogate": {"txt": b"a", "json": b'{"source": "\\ud800"}'},
    "a_text": {"txt": b"a", "json": b'{"captions": "a text"}'},
    "too_long": {"txt": b"a", "json": b" " * TEXT_BYTES + b'{"captions": ["b", "c"]}'},
}
USELESS = {
    "nothing": {},
    "blank": {"txt": b"  "},
    "not_utf8": {"txt": b"\xff"},
    "not_texts": {"txt": b"a", "json": b'{"captions": ["a", 3]}'},
    "not_an_object": {"txt": b"a", "json": b"[]"},
    "not_json": {"txt": b"a", "json": b"{"},
}


def write(path, samples):
    # Two images: everyone must choose the same.
    images = {"png": picture("red"), "jpg": picture("blue")}
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, content in {**images, **members}.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "0.tar"
    write(path, SAMPLES)
    return path


def walked(path):
    with path.open("rb") as file:
        return list(walk_shard(file))


def test_manifest_and_reader_agree_on_every_sample(shard):
    manifest = index([shard])
    reader = SampleReader(open_shards("data.train", str(shard.parent)))
    for place, found in enumerate(walked(shard)):
        sample = reader.read(0, place)
        assert sample.key == found.key
        assert sample.captions == describe_members(found).captions
        assert sample.image_id == describe_members(found).image_id
        assert sample.image == picture("blue")
        assert len(sample.captions) == manifest.shards[0].captions[place]


def described(key):
    return describe_members(TarSample(key, members=SAMPLES[key]))


def test_captions_and_identity_fall_back():
    own = described("own")
    assert (own.captions, own.image_id) == (("two", "three"), 7)
    elsewhere = described("elsewhere")
    assert elsewhere.captions == ("größer",)
    assert elsewhere.image_id == image_id_of("web", "elsewhere")
    for key in ("text", "boolean", "negative", "large"):
        assert described(key).image_id == image_id_of("", key)
    assert 0 <= image_id_of("web", "k") < 2**63
    assert image_id_of("", "k") != image_id_of("web", "k")


@pytest.mark.parametrize("key", USELESS)
def test_manifest_and_reader_refuse_the_same_samples(key, tmp_path):
    path = tmp_path / "0.tar"
    write(path, {key: USELESS[key]})
    (found,) = walked(path)
    fault = describe_members(found).fault
    assert fault
    with pytest.raises(DamagedSampleError, match=fault):
        parse_sample(path.read_bytes(), path.name)


def test_files_that_begin_with_a_dot_are_nobodys_for_index_and_reader_alike(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("a/1.jpg", picture("blue")),
            ("a/._1.jpg", b"of a mac"),
            ("a/.jpg", picture("red")),
            ("a/1.txt", b"one"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert index([path]).samples == 1
    sample = SampleReader(open_shards("data.train", str(tmp_path))).read(0, 0)
    assert (sample.key, sample.captions, sample.image) == ("a/1", ("one",), picture("blue"))


def test_a_member_twice_makes_a_sample_useless_for_every_reader(tmp_path):
    path = tmp_path / "0.tar"
    write(path, {"one": {"txt": b"a"}})
    whole = path.read_bytes()
    end = whole.index(b"one.txt") + 2 * tarfile.BLOCKSIZE
    path.write_bytes(whole[:end] + whole[end - 2 * tarfile.BLOCKSIZE :])
    (found,) = walked(path)
    assert describe_members(found).fault == "has a member twice"
    with pytest.raises(DamagedSampleError, match="one: has a member twice"):
        parse_sample(path.read_bytes(), path.name)
    assert list(read_through(path, Far())) == ["0.tar one: has a member twice"]
