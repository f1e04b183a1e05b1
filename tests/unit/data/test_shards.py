"""Shards are found where a setting says, and one that is not what its manifest says is named."""

import json
import os
import shutil
import tarfile

import pytest
import webdataset

from mmscale.config.data import SourceConfig
from mmscale.data.damage import DamagedSampleError
from mmscale.data.reader import SampleReader, parse_sample
from mmscale.data.shards import list_shards, open_shards
from mmscale.errors import ConfigError, DataError
from tests.unit.data.tars import write_shards


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards", [3, 4, 2], 600)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", "012"),
        ("/train-*.tar", "012"),
        ("/train-{000000,000002}.tar", "02"),
        ("/train-{000001..000002}.tar", "12"),
    ],
)
def test_folders_globs_and_brace_lists(folder, pattern, names):
    shards = open_shards("data.train", f"{folder}{pattern}")
    assert [path.name for path in shards.paths] == [f"train-00000{name}.tar" for name in names]
    assert shards.sources == ((len(names), 1.0),)


def test_webdataset_reads_packed_shards_as_the_reader_does(synthetic):
    shards = open_shards("data.train", str(synthetic.train))
    reader = SampleReader(shards)
    ours = [
        reader.read(number, sample)
        for number, shard in enumerate(shards.shards)
        for sample in range(shard.samples)
    ]
    theirs = list(webdataset.WebDataset([str(path) for path in shards.paths], shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in ours]
    for sample, other in zip(ours, theirs, strict=True):
        assert {name for name in other if not name.startswith("__")} == {"jpg", "txt", "json"}
        assert other["jpg"] == sample.image
        assert other["txt"].decode() == sample.captions[0]
        described = json.loads(other["json"])
        assert (described["image_id"], tuple(described["captions"])) == (
            sample.image_id,
            sample.captions,
        )


def test_sources_keep_their_weights(folder, tmp_path):
    other = write_shards(tmp_path / "other", [5], 600)
    sources = [
        SourceConfig(
            shards=[f"{folder}/train-000000.tar", f"{folder}/train-000002.tar"], weight=2.5
        ),
        SourceConfig(shards=str(other)),
    ]
    shards = open_shards("data.train", sources)
    assert shards.sources == ((2, 2.5), (1, 1.0))
    assert [shard.samples for shard in shards.shards] == [3, 2, 5]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("/none-*.tar", "no shard matches"),
        ("/train-{000001..000009}.tar", "there is no .*train-000003.tar"),
        ("/train-{000000..999999999}.tar", "more than 1,000,000 shards"),
        ("/train-{0..99999}{0..99999}.tar", "more than 1,000,000 shards"),
        ("/train-{0..9.tar", "braces do not match"),
        ("/new.tar", "not in .*manifest.json; run mmscale index"),
    ],
)
def test_what_matches_nothing_is_named_at_once(folder, pattern, said):
    shutil.copy(folder / "train-000000.tar", folder / "new.tar")
    with pytest.raises(DataError, match=said):
        open_shards("data.train", f"{folder}{pattern}")


def test_shards_without_a_manifest_are_only_read_when_resampled(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="mmscale index"):
        open_shards("data.train", str(folder))
    assert [path.name for path in list_shards("data.train", str(folder)).paths] == [
        f"train-00000{number}.tar" for number in range(3)
    ]


def _truncate(path):
    os.truncate(path, path.stat().st_size - 1024)


def _replace(path):
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


DAMAGE = {
    "deleted": (lambda path: path.unlink(), "deleted or replaced"),
    "replaced": (_replace, "deleted or replaced"),
    "truncated": (_truncate, "bytes, its manifest says"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_changes_during_the_run_is_named(folder, damage):
    act, said = DAMAGE[damage]
    reader = SampleReader(open_shards("data.train", str(folder)))
    assert reader.read(1, 0).key == "010000"
    act(folder / "train-000001.tar")
    assert reader.read(0, 0).key == "000000"
    with pytest.raises(DataError, match=f"train-000001.tar: .*{said}"):
        reader.read(1, 1)


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_shard_that_is_damaged_from_the_start_is_named_before_it_is_read(folder, damage):
    DAMAGE[damage][0](folder / "train-000002.tar")
    with pytest.raises(DataError, match=r"train-000002\.tar: .* manifest"):
        open_shards("data.train", str(folder))


def test_a_sparse_member_does_not_unfold(tmp_path):
    """A member that claims holes of many gigabytes is passed over: a sample without an image."""
    size = 2**36
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = header[398:410] = b"%011o\0" % 0
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    text = tarfile.TarInfo("a.txt")
    text.size = 4
    content = bytes(header) + text.tobuf() + b"text".ljust(512, b"\0") + bytes(1024)
    with pytest.raises(DamagedSampleError, match="has no image"):
        parse_sample(content, "here")


def test_a_command_is_not_run_unless_allowed(folder, tmp_path):
    touched = tmp_path / "touched"
    command = f"pipe:touch {touched}; cat {folder}/train-{{000000..000002}}.tar"
    for find in (open_shards, list_shards):
        with pytest.raises(ConfigError, match=r"data\.allow_pipe=true"):
            find("data.train", command)
    assert not touched.exists()


def test_commands_are_shards(folder):
    files = SampleReader(open_shards("data.train", str(folder)))
    shards = open_shards("data.train", f"pipe:cat '{folder}'/train-{{000000..000002}}.tar", True)
    reader = SampleReader(shards)
    for shard, record in enumerate(shards.shards):
        for sample in reversed(range(record.samples)):
            assert reader.read(shard, sample) == files.read(shard, sample)
    reader.close()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such bucket >&2; exit 3; cat '{}'", r"ended with 3 \(no such bucket\)"),
        ("head -c 1000 '{}'", "1000 bytes, its manifest says"),
    ],
)
def test_a_command_that_fails_is_named(folder, command, said):
    good = open_shards("data.train", str(folder))
    pipes = tuple(f"pipe:{command.format(path)}" for path in good.paths)
    reader = SampleReader(type(good)(good.shards, pipes, good.digest, good.sources))
    with pytest.raises(DataError, match=said):
        reader.read(0, 0)


def test_a_command_without_a_manifest_says_what_to_do(folder):
    for command, said in (("echo hello", "names no .tar"), ("cat nowhere/a.tar", "No such file")):
        with pytest.raises(DataError, match=f"{said}.*data.resampled=true"):
            open_shards("data.train", f"pipe:{command}", True)
