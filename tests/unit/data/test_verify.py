import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from mmscale.data.index import index
from mmscale.data.manifest import Manifest, read_manifest, write_manifest
from mmscale.data.pack import PackSettings, pack
from mmscale.data.synth import SynthSettings, render
from mmscale.data.verify import verify, verify_all
from mmscale.errors import DataError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    render(folder / "scenes", SynthSettings(24, seed=0, size=32))
    pack(folder / "scenes", folder / "packed", PackSettings(split="train", samples_per_shard=10))
    return folder / "packed"


@pytest.fixture
def packed(original, tmp_path):
    return shutil.copytree(original, tmp_path / "packed")


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, held):
    with tarfile.open(path, "w") as tar:
        for name, content in held:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def only(faults, *words):
    assert any(all(word in fault for word in words) for fault in faults), faults


def test_a_sound_folder_has_no_faults(packed):
    assert verify(packed) == []
    assert verify(packed, workers=2) == []


def test_a_missing_and_a_foreign_shard_are_named(packed):
    (packed / "train-000001.tar").rename(packed / "other.tar")
    faults = verify(packed)
    assert len(faults) == 2
    only(faults, "train-000001.tar", "missing")
    only(faults, "other.tar", "is not in manifest.json")


def test_one_flipped_pixel_byte_is_found(packed):
    path = packed / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 0xFF
    path.write_bytes(content)
    only(verify(packed), "train-000001.tar", "sha256 is")


def test_a_damaged_header_in_mid_file_is_found(packed):
    path = packed / "train-000000.tar"
    content = bytearray(path.read_bytes())
    offset = read_manifest(packed).shards[0].offsets[5]
    content[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    faults = verify(packed)
    only(faults, "damaged tar header", f"byte {offset}")
    only(faults, "holds 4 samples" if len(faults) > 3 else "holds", "manifest says 10")


def test_a_cut_shard_is_found(packed):
    path = packed / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    only(verify(packed), "train-000000.tar", "has 9000 bytes")


def test_a_manifest_that_lies_about_samples_is_found(packed):
    manifest = read_manifest(packed)
    first, *rest = manifest.shards
    moved = (first.offsets[0], first.offsets[1] + 512, *first.offsets[2:])
    write_manifest(packed, replace(manifest, shards=(replace(first, offsets=moved), *rest)))
    only(verify(packed), f"no sample begins at byte {first.offsets[1] + 512}, as the manifest says")
    counts = (4, *first.captions[1:])
    write_manifest(packed, replace(manifest, shards=(replace(first, captions=counts), *rest)))
    only(verify(packed), "has captions: 5, the manifest says 4")
    fewer = replace(
        first,
        samples=9,
        offsets=first.offsets[:9],
        captions=first.captions[:9],
        identities=None,
    )
    write_manifest(packed, replace(manifest, shards=(fewer, *rest)))
    assert verify(packed)


def described(folder, held):
    """A folder with one shard whose manifest is right about its bytes."""
    folder.mkdir()
    write_tar(folder / "x.tar", held)
    index([folder / "x.tar"], skipped=lambda line: None)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    described(tmp_path / "s", [("a.jpg", picture()[:-40]), ("a.txt", b"A"), ("b.jpg", b"no")])
    only(verify(tmp_path / "s"), "sample a cannot be decoded")


def test_a_key_in_two_shards_is_named(tmp_path):
    shards, lines = [], []
    for name in ("x", "y"):
        write_tar(tmp_path / f"{name}.tar", [("a.jpg", picture()), ("a.txt", b"A")])
        shards += index([tmp_path / f"{name}.tar"]).shards
    write_manifest(tmp_path, Manifest(None, "s", tuple(shards)))
    only(verify(tmp_path), "sample a is in x.tar too")
    manifest = index(tmp_path.glob("*.tar"), skipped=lines.append)
    assert [(shard.samples, shard.skipped) for shard in manifest.shards] == [(1, 0), (0, 1)]
    only(lines, "y.tar: sample a its key is in x.tar too")
    assert verify(tmp_path) == []


def test_a_manifest_that_lies_about_whose_image_it_is_is_found(packed):
    manifest = read_manifest(packed)
    first, *rest = manifest.shards
    true = first.identities
    for lie in (
        replace(true, images=(true.images[1], *true.images[1:])),
        replace(true, captions=(true.captions[1], *true.captions[1:])),
        replace(true, labels=(7, *true.labels[1:])),
    ):
        write_manifest(packed, replace(manifest, shards=(replace(first, identities=lie), *rest)))
        only(verify(packed), first.name, "identities are not those of its samples")


def test_every_split_is_verified_also_behind_a_damaged_manifest(packed):
    whole = packed.with_name("whole")
    for split in ("train", "val"):
        shutil.copytree(packed, whole / split)
    assert verify_all(whole) == []
    (whole / "train" / "manifest.json").write_text('{"half')
    (whole / "val" / "train-000000.tar").unlink()
    faults = verify_all(whole)
    assert len(faults) == 2
    only(faults, "train/manifest.json", "cannot be read as JSON")
    only(faults, "val/train-000000.tar", "is missing")


IMG2DATASET = [
    ("000.jpg", picture()),
    ("000.txt", b"A dog"),
    ("000.json", json.dumps({"url": "http://example.org", "image_id": "x7"}).encode()),
    ("001.jpg", picture()),
    ("001.cls", b"3"),
    ("001.txt", b"A cat"),
]


def test_index_reads_img2dataset_shards(tmp_path):
    write_tar(tmp_path / "00000.tar", IMG2DATASET)
    write_tar(tmp_path / "00001.tar", [(f"1{name}", content) for name, content in IMG2DATASET])
    manifest = index(tmp_path.glob("*.tar"))
    assert read_manifest(tmp_path) == manifest
    assert (manifest.samples, manifest.captions, manifest.split) == (4, 4, None)
    assert manifest.shards[0].captions == (1, 1)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        starts = {m.name: m.offset for m in tar}
    assert manifest.shards[0].offsets == (starts["000.jpg"], starts["001.jpg"])
    assert verify(tmp_path) == []


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_unknown_members_are_never_opened(tmp_path):
    held = [("a.pyd", pickle.dumps(Bomb())), *IMG2DATASET, ("../escape.pickle", b"x")]
    write_tar(tmp_path / "x.tar", held)
    manifest = index([tmp_path / "x.tar"], skipped=lambda line: None)
    assert manifest.samples == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "x.tar"]
    assert not (tmp_path.parent / "escape.pickle").exists()


def test_index_names_samples_that_it_leaves_out(tmp_path):
    held = [*IMG2DATASET, ("002.jpg", picture()), ("003.txt", b"no image"), ("000.jpg", b"again")]
    write_tar(tmp_path / "x.tar", held)
    lines = []
    (shard,) = index([tmp_path / "x.tar"], skipped=lines.append).shards
    assert (shard.samples, shard.skipped) == (2, 3)
    assert [line.split("sample ")[1] for line in lines] == [
        "002 has an empty caption or none",
        "003 has no image",
        "000 its key occurs twice",
    ]
    assert verify(tmp_path) == []


def test_index_in_several_processes_writes_the_same_manifest(packed):
    (packed / "manifest.json").unlink()
    tars = sorted(packed.glob("*.tar"))
    index(tars)
    alone = (packed / "manifest.json").read_bytes()
    index(tars, workers=2)
    assert (packed / "manifest.json").read_bytes() == alone


def test_index_names_all_damaged_shards_and_writes_nothing(packed):
    (packed / "manifest.json").unlink()
    (packed / "train-000000.tar").write_bytes(b"no tar")
    (packed / "train-000002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000000\.tar: .*\(1 more shards like it\)"):
        index(packed.glob("*.tar"))
    assert not (packed / "manifest.json").exists()


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\xff" * 2000])
def test_index_refuses_what_is_no_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar"):
        index([tmp_path / "x.tar"])


def test_index_wants_shards_of_one_folder(tmp_path):
    with pytest.raises(DataError, match="no shard matches"):
        index([])
    with pytest.raises(DataError, match="one folder at a time"):
        index([tmp_path / "a" / "x.tar", tmp_path / "b" / "y.tar"])


def test_a_missing_manifest_names_the_repair(tmp_path):
    with pytest.raises(DataError, match="mmscale index"):
        read_manifest(tmp_path)


def sound():
    return {
        "format": "mmscale-manifest",
        "version": 1,
        "split": "train",
        "source": "s",
        "settings": None,
        "shards": [
            {
                "name": "x.tar",
                "bytes": 10240,
                "sha256": "0" * 64,
                "samples": 2,
                "offsets": [0, 2048],
                "captions": [5, 5],
            }
        ],
    }


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("name", "../x.tar", "plain file name"),
        ("name", "a/x.tar", "plain file name"),
        ("name", 3, "plain file name"),
        ("bytes", -1, "not a count"),
        ("bytes", True, "not a count"),
        ("sha256", "zz", "64 hex"),
        ("samples", 3, "2 offsets for 3 samples"),
        ("offsets", [2048, 0], "do not rise"),
        ("offsets", [0, 20480], "no tar block"),
        ("offsets", [0, 100], "no tar block"),
        ("offsets", "ab", "not a list"),
        ("captions", [5, 0], "sample 1 has no caption"),
        ("captions", [5], "1 captions for 2 samples"),
    ],
)
def test_a_manifest_is_not_believed(tmp_path, field, value, word):
    content = sound()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(tmp_path).captions == 10
    content["shards"][0][field] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=word):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "mmscale-manifest", "version": 9}'])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_digest_follows_the_shards(packed):
    manifest = read_manifest(packed)
    assert Manifest(None, "other", manifest.shards).digest == manifest.digest
    first, *rest = manifest.shards
    changed = replace(first, sha256="0" * 64)
    assert replace(manifest, shards=(changed, *rest)).digest != manifest.digest
    assert replace(manifest, shards=(*rest, first)).digest != manifest.digest
