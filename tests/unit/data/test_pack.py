import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmscale.data.manifest import read_manifest
from mmscale.data.pack import PackSettings, pack
from mmscale.data.pack_folder import PackResult
from mmscale.data.synth import SynthSettings, render
from mmscale.data.verify import verify
from mmscale.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    render(folder, SynthSettings(48, seed=0, size=32))
    return folder


@pytest.fixture
def table(tmp_path):
    """A folder of pictures with a caption each; gives a function that adds one."""
    folder = tmp_path / "table"
    (folder / "images").mkdir(parents=True)
    (folder / "captions.csv").write_text("image,caption\n")

    def add(name, content):
        (folder / "images" / name).write_bytes(content)
        with (folder / "captions.csv").open("a") as file:
            file.write(f"{name},A picture called {name}\n")

    add.folder = folder
    return add


def encoded(size=(40, 30), form="JPEG", exif=None):
    image = Image.effect_noise(size, 60).convert("RGB")
    image.putpixel((0, 0), (255, 0, 0))
    file = io.BytesIO()
    image.save(file, form, **({"exif": exif} if exif else {}))
    return file.getvalue()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def rejected(folder):
    lines = (folder / "rejected.txt").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def test_a_folder_a_split_with_manifest_and_original_bytes(scenes, tmp_path):
    results = pack(scenes, tmp_path, PackSettings(samples_per_shard=16))
    assert [(r.split, r.samples, r.captions, r.shards) for r in results] == [
        ("train", 40, 200, 3),
        ("val", 4, 20, 1),
        ("test", 4, 20, 1),
    ]
    manifest = read_manifest(tmp_path / "train")
    assert [shard.samples for shard in manifest.shards] == [16, 16, 8]
    assert (manifest.split, manifest.source) == ("train", "flickr30k")
    held = members(tmp_path / "test" / "test-000000.tar")
    entry = json.loads((scenes / "dataset_flickr30k.json").read_text())["images"][44]
    key = entry["filename"].removesuffix(".jpg")
    assert list(held)[:3] == [f"{key}.jpg", f"{key}.txt", f"{key}.json"]
    assert held[f"{key}.jpg"] == (scenes / "images" / entry["filename"]).read_bytes()
    description = json.loads(held[f"{key}.json"])
    assert description["captions"] == [s["raw"] for s in entry["sentences"]]
    assert held[f"{key}.txt"].decode() == description["captions"][0]
    assert (description["label"], description["source"]) == (entry["label"], "flickr30k")
    assert 0 <= description["image_id"] < 2**63
    assert verify(tmp_path / "train") == []


def test_one_split_goes_into_the_folder_itself(scenes, tmp_path):
    (result,) = pack(scenes, tmp_path, PackSettings(split="val"))
    assert result.folder == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "val-000000.tar"]
    with pytest.raises(DataError, match="it has train, val, test"):
        pack(scenes, tmp_path / "other", PackSettings(split="held-out"))


def test_same_bytes_at_any_number_of_workers(scenes, tmp_path):
    pack(scenes, tmp_path / "one", PackSettings(samples_per_shard=8), workers=1)
    pack(scenes, tmp_path / "three", PackSettings(samples_per_shard=8), workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_offsets_lead_to_each_sample(scenes, tmp_path):
    pack(scenes, tmp_path, PackSettings(split="train", samples_per_shard=16))
    for shard in read_manifest(tmp_path).shards:
        content = (tmp_path / shard.name).read_bytes()
        for offset in shard.offsets:
            name = content[offset : offset + 100].rstrip(b"\0").decode()
            assert name.endswith(".jpg")


def test_bad_images_are_rejected_by_name_and_reason(table, tmp_path):
    table("good.jpg", encoded())
    table("short.jpg", encoded()[:-300])
    table("empty.jpg", b"")
    table("text.jpg", b"<html>404</html>")
    table("wide.png", encoded((300, 200), "PNG"))
    table("gone.jpg", b"x")
    (table.folder / "images" / "gone.jpg").unlink()
    (result,) = pack(table.folder, tmp_path / "out", PackSettings(max_pixels=10_000))
    assert (result.samples, result.rejected) == (1, 5)
    found = rejected(tmp_path / "out" / "train")
    assert found.pop("short").startswith("undecodable: image file is truncated")
    assert found == {
        "empty": "zero bytes",
        "text": "undecodable: not a JPEG, PNG or WebP image",
        "wide": "more pixels than 10000: 300 x 200",
        "gone": "missing file",
    }
    assert "5 rejected, 2 undecodable, 1" in str(result)
    assert verify(tmp_path / "out" / "train") == []


def test_a_shard_of_rejected_images_is_left_out(table, tmp_path):
    for name in ("a", "b"):
        table(f"{name}.jpg", b"")
    table("c.jpg", encoded())
    pack(table.folder, tmp_path / "out", PackSettings(split="train", samples_per_shard=2))
    assert [shard.name for shard in read_manifest(tmp_path / "out").shards] == ["train-000001.tar"]
    assert verify(tmp_path / "out") == []


def test_nothing_packed_is_an_error_that_names_the_first_reason(table, tmp_path):
    table("a.jpg", b"")
    with pytest.raises(DataError, match="all 1 images were rejected, first a: zero bytes"):
        pack(table.folder, tmp_path / "out")
    assert rejected(tmp_path / "out" / "train") == {"a": "zero bytes"}
    table("b.jpg", encoded())
    (result,) = pack(table.folder, tmp_path / "out")
    assert (result.samples, result.rejected) == (1, 1)


@pytest.mark.parametrize("settings", [{"resize": 30}, {"quality": 80}])
def test_photographs_that_are_encoded_anew_are_turned_upright(table, tmp_path, settings):
    exif = Image.Exif()
    exif[0x0112] = 6
    table("turned.jpg", encoded((80, 60), exif=exif))
    pack(table.folder, tmp_path / "kept", PackSettings(split="train"))
    held = members(tmp_path / "kept" / "train-000000.tar")
    assert held["turned.jpg"] == (table.folder / "images" / "turned.jpg").read_bytes()
    pack(table.folder, tmp_path / "anew", PackSettings(split="train", **settings))
    held = members(tmp_path / "anew" / "train-000000.tar")
    with Image.open(io.BytesIO(held["turned.jpg"])) as image:
        assert image.height > image.width
        assert image.getexif().get(0x0112, 1) == 1


def test_quality_encodes_every_image_anew(table, tmp_path):
    table("photo.jpg", encoded((80, 60)))
    table("drawn.png", encoded((80, 60), "PNG"))
    sizes = {}
    for quality in (20, 90):
        pack(table.folder, tmp_path / str(quality), PackSettings(split="train", quality=quality))
        held = members(tmp_path / str(quality) / "train-000000.tar")
        sizes[quality] = len(held["photo.jpg"])
        with Image.open(io.BytesIO(held["drawn.png"])) as image:
            assert (image.format, image.size) == ("PNG", (80, 60))
    assert sizes[20] < sizes[90]
    with pytest.raises(ConfigError, match="quality=101"):
        pack(table.folder, tmp_path / "no", PackSettings(quality=101))


def test_resize_shrinks_the_short_side_and_never_enlarges(table, tmp_path):
    table("large.jpg", encoded((120, 60)))
    table("drawn.png", encoded((60, 120), "PNG"))
    table("moving.webp", encoded((60, 120), "WEBP"))
    table("small.jpg", encoded((20, 40)))
    pack(table.folder, tmp_path / "out", PackSettings(split="train", resize=30))
    held = members(tmp_path / "out" / "train-000000.tar")
    for name, size in (("large.jpg", (60, 30)), ("drawn.png", (30, 60)), ("moving.webp", (30, 60))):
        with Image.open(io.BytesIO(held[name])) as image:
            assert image.size == size
    assert held["small.jpg"] == (table.folder / "images" / "small.jpg").read_bytes()


class KilledError(Exception):
    pass


def test_goes_on_after_a_stop_without_redoing_finished_shards(scenes, tmp_path):
    pack(scenes, tmp_path / "straight", PackSettings(split="train", samples_per_shard=8))

    def stop(done, total):
        if done >= 24:
            raise KilledError

    out = tmp_path / "stopped"
    with pytest.raises(KilledError):
        pack(scenes, out, PackSettings(split="train", samples_per_shard=8), progress=stop)
    assert not (out / "manifest.json").exists()
    before = (out / "train-000001.tar").stat().st_ino
    (out / "train-000002.tar").write_bytes(b"torn")
    (result,) = pack(scenes, out, PackSettings(split="train", samples_per_shard=8))
    assert result.kept == 2
    assert (out / "train-000001.tar").stat().st_ino == before
    assert contents(out) == contents(tmp_path / "straight")


def test_lost_manifest_and_shards_are_written_again(scenes, tmp_path):
    pack(scenes, tmp_path, PackSettings(split="train", samples_per_shard=8))
    whole = contents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-000003.tar").unlink()
    (tmp_path / "train-000004.tar").unlink()
    pack(scenes, tmp_path, PackSettings(split="train", samples_per_shard=8))
    assert contents(tmp_path) == whole
    (tmp_path / "train-000001.tar").write_bytes(b"torn")
    pack(scenes, tmp_path, PackSettings(split="train", samples_per_shard=8))
    assert contents(tmp_path) == whole


KILLED_PACK = """
import os, signal, sys
from pathlib import Path
from mmscale.data.pack import PackSettings, pack

def die(done, total):
    if done >= 16:
        os.kill(os.getpid(), signal.SIGKILL)

settings = PackSettings(split="train", samples_per_shard=8)
pack(Path(sys.argv[1]), Path(sys.argv[2]), settings, workers=2, progress=die)
"""


def test_a_killed_process_can_be_gone_on_with(scenes, tmp_path):
    out = tmp_path / "killed"
    words = [sys.executable, "-c", KILLED_PACK, str(scenes), str(out)]
    # Workers that outlived their parent would hold the pipe open.
    ended = subprocess.run(words, stdout=subprocess.PIPE, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    (out / ".train-000004.tar.part").write_bytes(b"torn")
    (out / "train-000004.tar").unlink(missing_ok=True)
    (result,) = pack(scenes, out, PackSettings(split="train", samples_per_shard=8))
    assert result.kept >= 2
    pack(scenes, tmp_path / "straight", PackSettings(split="train", samples_per_shard=8))
    assert contents(out) == contents(tmp_path / "straight")


def test_a_finished_pack_is_left_as_it_is(scenes, tmp_path):
    pack(scenes, tmp_path, PackSettings(split="val"))
    before = (tmp_path / "val-000000.tar").stat().st_ino
    (result,) = pack(scenes, tmp_path, PackSettings(split="val"))
    assert (result.kept, result.samples) == (1, 4)
    assert (tmp_path / "val-000000.tar").stat().st_ino == before


def test_packs_are_not_mixed(scenes, tmp_path):
    pack(scenes, tmp_path, PackSettings(split="val"))
    with pytest.raises(DataError, match="other settings"):
        pack(scenes, tmp_path, PackSettings(split="val", resize=16))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"val-000000\.tar: is not of this pack"):
        pack(scenes, tmp_path, PackSettings(split="test"))


def test_numbers_below_one_are_refused(scenes, tmp_path):
    with pytest.raises(ConfigError, match="samples_per_shard=0"):
        pack(scenes, tmp_path, PackSettings(samples_per_shard=0))


def test_an_unfinished_pack_with_other_settings_is_not_gone_on_with(scenes, tmp_path):
    def stop(done, total):
        raise KilledError

    with pytest.raises(KilledError):
        pack(scenes, tmp_path, PackSettings(split="train", samples_per_shard=8), progress=stop)
    with pytest.raises(DataError, match="was begun here"):
        pack(scenes, tmp_path, PackSettings(split="train", samples_per_shard=8, resize=16))


def test_progress_counts_images(scenes, tmp_path):
    seen, settings = [], PackSettings(samples_per_shard=20)
    pack(scenes, tmp_path, settings, progress=lambda *count: seen.append(count))
    assert seen == [(20, 48), (40, 48), (44, 48), (48, 48)]


def test_real_flickr8k(tmp_path):
    folder = Path(os.environ.get("MMSCALE_TEST_DATA", "")) / "flickr8k-mini"
    if "MMSCALE_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("MMSCALE_TEST_DATA names no folder that holds flickr8k-mini")
    (result,) = pack(folder, tmp_path, PackSettings(split="val"))
    assert (result.samples, result.captions, result.rejected) == (1000, 5000, 0)
    assert verify(tmp_path) == []


def test_a_result_reads_well():
    result = PackResult("train", Path("packed/train"), 6, 6000, 30000, rejected=3, kept=1)
    assert str(result) == (
        "train: 6,000 images, 30,000 captions in 6 shards at packed/train "
        "(3 rejected: see rejected.txt; 1 shard of an earlier run kept)"
    )
    result = PackResult("val", Path("packed/val"), 1, 1, 5, rejected=0, kept=0)
    assert str(result) == "val: 1 image, 5 captions in 1 shard at packed/val"


def test_of_equal_images_the_held_out_one_stays(tmp_path):
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    same, other = encoded((40, 30)), encoded((60, 30))
    # Of the same size and end, but not the same.
    twin = bytes([*other[:100], other[100] ^ 1, *other[101:]])
    pictures = {"a": same, "b": other, "c": same, "d": same, "e": twin, "f": other}
    splits = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "train", "f": "train"}
    for name, content in pictures.items():
        (folder / "images" / f"{name}.jpg").write_bytes(content)
    rows = "".join(f"{name}.jpg,A,{splits[name]}\n" for name in pictures)
    (folder / "captions.csv").write_text(f"image,caption,split\n{rows}")
    with pytest.raises(DataError, match="val: nothing was packed"):
        pack(folder, tmp_path / "out", workers=2)
    reason = "duplicate image: has the bytes of"
    assert rejected(tmp_path / "out" / "train") == {
        "a": f"{reason} d in test",
        "f": f"{reason} b in train",
    }
    assert rejected(tmp_path / "out" / "val") == {"c": f"{reason} d in test"}


def test_a_full_disk_or_a_wrong_folder_is_told(scenes, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"out=.*file: cannot be written"):
        pack(scenes, tmp_path / "file")
