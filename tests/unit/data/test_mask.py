"""`data.mask`: training is what it would be had the images never been packed."""

import json
import shutil
import tarfile
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mmscale.config.data import DataConfig
from mmscale.config.load import load_config
from mmscale.contracts import Position, World
from mmscale.data.far import Far
from mmscale.data.forward import Reading, read_from, read_through
from mmscale.data.index import index
from mmscale.data.manifest import read_manifest, write_manifest
from mmscale.data.mask import Mask, masked, read_mask, write_mask
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards, open_train
from mmscale.data.stream import TrainStream
from mmscale.data.tar import walk_shard
from mmscale.engine.plan import plan_batch
from mmscale.errors import DataError
from tests.unit.data.tars import add, write_shards
from tests.unit.data.test_two_sources import SPEC, write
from tests.unit.data.web_server import serving

IMAGES, SHARDS = 36, 3
# A whole shard, the first and last of another, neighbours in the third.
MASKED = {*range(12), 12, 23, 27, 28, 29}
FIELDS = ("keys", "captions", "image_ids", "match_ids", "labels")


def reduced(folder, to, ids):
    """The same shards, packed without some images."""
    to.mkdir(parents=True)
    for shard in read_manifest(folder).shards:
        with (folder / shard.name).open("rb") as file:
            samples = zip(walk_shard(file), shard.identities.images, strict=True)
            keys = {sample.key for sample, image in samples if image in ids}
        rewrite(
            folder / shard.name,
            lambda name, content, gone=keys: (
                () if name.partition(".")[0] in gone else [(name, content)]
            ),
            to / shard.name,
        )
    index(sorted(to.glob("*.tar")))
    return to


def rewrite(path, change, to=None):
    """A tar with other members: `change` gives those that come in the place of one."""
    with tarfile.open(path) as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(to or path, "w") as tar:
        for name, content in found:
            for renamed, other in change(name, content):
                add(tar, renamed, other)


def ids_of(folder, numbers):
    images = [image for s in read_manifest(folder).shards for image in s.identities.images]
    return [images[number] for number in sorted(numbers)]


def digest_of(folder):
    return read_manifest(folder).digest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sources, each whole and without what the mask names, and the mask."""
    base = tmp_path_factory.mktemp("mask")
    whole = [write(base / n, n, IMAGES, "groups", SHARDS) for n in ("a", "b")]
    some = [MASKED, {3, 30}]
    less = [
        reduced(folder, base / "less" / folder.name, ids_of(folder, numbers))
        for folder, numbers in zip(whole, some, strict=True)
    ]
    named = {digest_of(f): ids_of(f, n) for f, n in zip(whole, some, strict=True)}
    write_mask(base / "both.json", named)
    write_mask(base / "a.json", {digest_of(whole[0]): named[digest_of(whole[0])]})
    return whole, less, base


def _listed(values):
    return values if isinstance(values, list) else values.tolist()


def batches(where, *words, world=1, workers=0, start=0, count=4):
    """Some global batches; the rows of all ranks laid end to end."""
    given = json.dumps(where) if isinstance(where, list) else where
    config = load_config(
        ["demo", f"data.train={given}", f"data.workers={workers}", "train.global_batch_size=4",
         "data.shuffle_buffer=8", "data.augment=none", *words]
    )  # fmt: skip
    shards = open_train(config.data)
    schedule = plan_schedule(config, shards, plan_batch(config, 2).lanes)
    found = []
    for rank in range(world):
        stream = TrainStream(config, shards, schedule, SPEC, World(rank, world))
        found.append(list(islice(stream.batches(Position(0, 4 * start)), count)))
    return [
        {
            "image": torch.cat([batch.image for batch, _ in parts]),
            **{f: [v for batch, _ in parts for v in _listed(getattr(batch, f))] for f in FIELDS},
            "position": parts[0][1],
        }
        for parts in zip(*found, strict=True)
    ]


def assert_equal(found, wanted, *but):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one["image"], other["image"])
        for name in {*FIELDS, "position"} - set(but):
            assert one[name] == other[name], name


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("data.captions=flat",),
        ("data.captions=2", "data.match=group"),
        ("data.match=caption", "data.positive_share=0"),
    ],
    ids=" ".join,
)
def test_the_stream_is_that_of_shards_packed_without_the_images(folders, words):
    (whole, _), (less, _), base = folders
    found = batches(str(whole), *words, f"data.mask={base / 'a.json'}", count=9)
    assert_equal(found, batches(str(less), *words, count=9))
    # The oracle is not empty: the mask matters.
    assert found[0]["keys"] != batches(str(whole), *words, count=1)[0]["keys"]


def test_a_stream_goes_on_in_its_middle_at_any_world_and_worker_count(folders):
    (whole, _), _, base = folders
    mask = f"data.mask={base / 'a.json'}"
    straight = batches(str(whole), mask)
    assert_equal(batches(str(whole), mask, start=2, count=2), straight[2:])
    assert_equal(batches(str(whole), mask, world=2), straight)
    assert_equal(batches(str(whole), mask, world=2, workers=1, start=1, count=3), straight[1:])


def test_an_id_counts_in_the_source_that_its_manifest_names(folders):
    """Both sources hold the ids 0 to 35, of other images."""
    whole, less, base = folders
    weighted = [[{"shards": str(f), "weight": w} for f, w in zip(pair, (1, 2), strict=True)]
                for pair in (whole, less)]  # fmt: skip
    found = batches(weighted[0], f"data.mask={base / 'both.json'}", count=9)
    # Ids of several sources are set apart by the digests of their manifests.
    wanted = batches(weighted[1], count=9)
    assert_equal(found, wanted, "image_ids", "match_ids")
    for one, other in zip(found, wanted, strict=True):
        assert one["image_ids"] != other["image_ids"]
        assert _pattern(one["image_ids"]) == _pattern(other["image_ids"])
    left = open_train(_data(whole, base / "both.json"))
    for folder, numbers in zip(whole, (MASKED, {3, 30}), strict=True):
        own = {
            image ^ left.salts[place]
            for place, shard in enumerate(left.shards)
            if left.manifests[place] == digest_of(folder)
            for image in shard.identities.images
        }
        assert own == set(range(IMAGES)) - set(ids_of(folder, numbers))


def _pattern(ids):
    """Which of them are equal."""
    return [ids.index(one) for one in ids]


def _data(where, mask, **more):
    places = [str(place) for place in where] if isinstance(where, list) else str(where)
    return DataConfig(train=places, mask=str(mask), **more)


def test_a_list_counts_in_every_source(folders, tmp_path):
    (one, other), _, _ = folders
    (tmp_path / "ids.txt").write_text("3\n7\n\n30\n")
    shards = open_train(_data([one, other], tmp_path / "ids.txt"))
    assert shards.samples == 2 * IMAGES - 6


@pytest.mark.parametrize("ranges", [True, False])
def test_what_is_left_out_is_not_fetched(tmp_path, ranges, monkeypatch):
    folder = write_shards(tmp_path / "s", [40, 30], 60_000)
    numbers = {*range(3, 38), *range(40, 65)}
    (tmp_path / "ids").write_text(json.dumps(ids_of(folder, numbers)))
    left = open_train(_data(folder, tmp_path / "ids"))
    files = SampleReader(left)
    every = [(s, n) for s, shard in enumerate(left.shards) for n in range(shard.samples)]
    before = SampleReader(open_shards("data.train", str(folder)))
    kept = [divmod(n, 40) for n in range(70) if n not in numbers]
    assert [files.read(*at) for at in every] == [before.read(*at) for at in kept]
    with serving(folder) as server:
        server.ranges = ranges
        far = open_train(DataConfig(train=server.url, mask=str(tmp_path / "ids")))
        reader = SampleReader(far, window=4)
        sent = server.sent()
        assert [reader.read(*at) for at in every] == [files.read(*at) for at in every]
        reader.close()
        if ranges:
            whole = sum(shard.bytes for shard in far.shards)
            assert server.sent() - sent < whole * 0.25


def test_shards_read_forward_pass_over_the_same_images(tmp_path):
    """Whatever lies before an image in its sample, and wherever a tar is entered."""
    folder = tmp_path / "s"
    write_shards(folder, [9, 5, 7], 9_000, manifest=False)
    numbers = {0, 3, 4, 8, *range(9, 14), 20}
    long = "folder/" * 20

    def among_others(name, content):
        """A member that nobody reads stands first in each sample, and names are long ones."""
        first = [(f"{long}{name[:6]}.cls", b"1")] if name.endswith("jpg") else []
        return [*first, (long + name, content)]

    for path in folder.glob("*.tar"):
        rewrite(path, among_others)
    index(sorted(folder.glob("*.tar")))
    (tmp_path / "ids").write_text(json.dumps(ids_of(folder, numbers)))
    data = _data(folder, tmp_path / "ids", resampled=True)
    shards = open_train(data)
    assert not shards.shards
    assert shards.mask
    bare = open_train(DataConfig(train=str(folder), resampled=True))
    sizes = [0, 9, 14]
    places = [(sum(number >= size for size in sizes) - 1, number) for number in numbers]
    masked_keys = {f"{long}{shard:02d}{number - sizes[shard]:04d}" for shard, number in places}
    for path, without in zip(shards.paths, shards.left_out, strict=True):
        for part in (n / 40 for n in range(40)):
            every = [s.key for s in read_from(path, Far(), part, {})]
            found = [s.key for s in read_from(path, Far(), part, {}, Reading(without))]
            assert found == [key for key in every if key not in masked_keys]
    config = load_config(
        ["demo", f"data.train={folder}", "data.resampled=true", "train.global_batch_size=4",
         f"data.mask={tmp_path / 'ids'}", "data.shuffle_buffer=8"]
    )  # fmt: skip
    plan = plan_schedule(config, shards, 2)
    # Counted, as manifests tell whose the images are.
    assert plan.items == 11
    lanes = [lane for epoch in range(9) for lane in plan.epoch(epoch)]
    keys = {item.content.key for lane in lanes for item in lane.items()}
    assert len(keys) == 11
    assert not masked_keys & keys
    assert bare.digest != shards.digest
    assert sum(1 for _ in read_through(shards.paths[1], Far(), Reading(shards.left_out[1]))) == 0


def test_a_tar_without_a_manifest_cannot_be_masked(tmp_path):
    folder = write_shards(tmp_path / "s", [3, 3], 900)
    (tmp_path / "ids").write_text(json.dumps(ids_of(folder, {1})))
    shutil.copy(folder / "train-000001.tar", folder / "train-000002.tar")
    with pytest.raises(DataError, match=r"train-000002.tar is in no manifest.*mmscale index"):
        open_train(_data(folder, tmp_path / "ids", resampled=True))
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="mmscale index"):
        open_train(_data(folder, tmp_path / "ids", resampled=True))


FORMS = {
    "[3, 5, 5]": Mask("m", frozenset({3, 5}), {}),
    "3\n5\r\n\n": Mask("m", frozenset({3, 5}), {}),
    "\ufeff3": Mask("m", frozenset({3}), {}),
    "": Mask("m", frozenset(), {}),
    '{"masked": {"ab": [7], "cd": []}, "more": 1}': Mask(
        "m", frozenset(), {"ab": frozenset({7}), "cd": frozenset()}
    ),
}


@pytest.mark.parametrize("text", FORMS)
def test_forms_of_a_mask(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").write_text(text, "utf-8")
    assert read_mask("m") == FORMS[text]


@pytest.mark.parametrize(
    "content",
    [b"[1, true]", b"[1.0]", b"[-1]", b"[9223372036854775808]", b"[[1]]", b"{}", b"[" * 100_000,
     b'{"masked": [1]}', b'{"masked": {"ab": {"c": 1}}}', b"a.jpg\n", b"\xff\xfe", b"[1"],
)  # fmt: skip
def test_what_is_no_mask_is_refused_with_its_form(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(DataError, match=r"m: is no mask .*; write a JSON list"):
        read_mask(str(tmp_path / "m"))


def test_a_mask_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: cannot be read"):
        read_mask(str(tmp_path / "absent"))


def _told(shards, ids=(), within=None):
    told = []
    found = masked(shards, Mask("m", frozenset(ids), within or {}), told.append)
    return found, told


def test_ids_of_nobody_are_counted_and_none_of_somebody_is_refused(folders):
    (one, other), _, _ = folders
    shards = open_shards("x", str(one))
    _, told = _told(shards, [3, 99, 100])
    assert told == ["data.mask=m: leaves out 1 of the 36 images of data.train; 2 of its ids are of "
                    "no image there"]  # fmt: skip
    _, told = _told(shards, [3])
    assert told == ["data.mask=m: leaves out 1 of the 36 images of data.train"]
    _, told = _told(shards, (), {digest_of(one): frozenset({1}), digest_of(other): frozenset({2})})
    assert "1 of its ids are" in told[0]
    with pytest.raises(DataError, match="none of its 2 ids is of an image"):
        _told(shards, [99, 100])
    with pytest.raises(DataError, match="none of its 1 ids is of an image"):
        _told(shards, (), {digest_of(other): frozenset({2})})
    with pytest.raises(DataError, match="leaves no image of"):
        _told(shards, range(36))
    empty, told = _told(shards)
    assert empty == shards
    assert "leaves out 0 of" in told[0]


def test_masks_that_leave_out_the_same_are_the_same_data_and_others_are_not(folders):
    (one, _), _, _ = folders
    shards = open_shards("x", str(one))
    listed, _ = _told(shards, [3, 99])
    within, _ = _told(shards, (), {digest_of(one): frozenset({3})})
    more, _ = _told(shards, [3, 4])
    assert listed.digest == within.digest
    assert listed.mask == within.mask
    assert len({shards.digest, listed.digest, more.digest}) == 3


def test_copies_of_what_is_left_out_are_not_counted(tmp_path):
    """The second of two images with the same bytes is no copy when the first is left out."""
    folder = write(tmp_path / "s", 1, 6, "ids", 2)
    with tarfile.open(folder / "00000.tar") as tar:
        first = tar.extractfile("000000000.png").read()
    last = "000000005.png"
    rewrite(folder / "00001.tar", lambda name, own: [(name, first if name == last else own)])
    index(sorted(folder.glob("*.tar")))
    shards = open_shards("x", str(folder))
    assert shards.copies == 1
    assert _told(shards, [0])[0].copies == 0


def test_a_manifest_without_ids_cannot_be_masked(tmp_path):
    folder = write_shards(tmp_path / "s", [3], 900)
    manifest = read_manifest(folder)
    bare = tuple(replace(shard, identities=None) for shard in manifest.shards)
    write_manifest(folder, replace(manifest, shards=bare))
    (tmp_path / "m").write_text("1")
    with pytest.raises(DataError, match=r"data.mask needs the images' identities.*mmscale index"):
        open_train(_data(folder, tmp_path / "m"))
