"""Images with a class each: what says the class, how it is numbered, and what is refused."""

import re
import tarfile

import pytest
from PIL import Image

from mmscale.contracts import InputSpec
from mmscale.data.labelled import LabelledBatches, open_labelled
from mmscale.data.pack import PackSettings, pack
from mmscale.errors import DataError
from tests.unit.data.tars import add

CLASSES = ("cat", "dog", "7")


def opened(where, classes=CLASSES):
    return open_labelled("eval.sets.pets.data", str(where), classes, "names.txt")


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path, "PNG")
    return path


@pytest.fixture
def png(tmp_path):
    return picture(tmp_path / "one" / "one.png").read_bytes()


@pytest.mark.parametrize(
    ("ending", "content", "label"),
    [
        ("cls", b"1", 1),
        ("cls", b" dog\n", 1),
        # The name of a class before its number.
        ("cls", b"7", 2),
        ("json", b'{"label": 1, "cls": 0}', 1),
        ("json", b'{"cls": "cat", "captions": ["a pet"]}', 0),
        ("json", b'{"label": "7"}', 2),
    ],
)
def test_a_sample_says_its_class(tmp_path, png, ending, content, label):
    shard = tmp_path / "shards" / "0.tar"
    write_tar(shard, {"a.png": png, f"a.{ending}": content, "b.cls": b"0", "b.png": png})
    assert opened(shard.parent).labels == (label, 0)
    assert opened(shard).labels == (label, 0)


@pytest.mark.parametrize("folders", [("dog", "cat", "7"), ("n02", "n01", "n03")])
def test_a_folder_for_each_class(tmp_path, folders):
    root = tmp_path / "pets"
    for shade, folder in enumerate(folders):
        picture(root / folder / "deep" / "x.PNG", 50 * shade)
        picture(root / folder / "y.png", 50 * shade + 1)
        (root / folder / "notes.txt").write_text("not a picture")
    found = opened(root)
    pairs = zip(found.files, found.labels, strict=True)
    by_folder = {path.relative_to(root).parts[0]: number for path, number in pairs}
    # By their names; where none is a class, by the order of both.
    named = {"dog": 1, "cat": 0, "7": 2}
    assert by_folder == (named if "dog" in folders else {"n01": 0, "n02": 1, "n03": 2})
    assert len(found.files) == 6


def test_packed_labels_are_the_names_that_they_had(tmp_path):
    rows = [("dog", "a.png"), ("7", "b.png"), ("cat", "c.png")]
    for shade, (_, name) in enumerate(rows):
        picture(tmp_path / "source" / name, 80 * shade)
    table = tmp_path / "source" / "table.csv"
    lines = [f"{name},a pet,{label},val" for label, name in rows]
    table.write_text("\n".join(["image,caption,label,split", *lines]) + "\n")
    pack(table, tmp_path / "packed", PackSettings())
    assert sorted(opened(tmp_path / "packed" / "val").labels) == [0, 1, 2]
    reordered = opened(tmp_path / "packed" / "val", ("7", "dog", "cat"))
    # Keys keep the table's order.
    assert reordered.labels == (1, 0, 2)


def test_images_are_read_where_they_lie(tmp_path):
    names = {
        f"{n}.png": picture(tmp_path / "f" / f"{n}.png", 20 * n).read_bytes() for n in range(5)
    }
    labels = {f"{n}.cls": b"0" for n in range(5)}
    write_tar(tmp_path / "s" / "0.tar", dict(sorted((names | labels).items())))
    picture(tmp_path / "folders" / "cat" / "only.png", 60)
    (tmp_path / "folders" / "cat" / "torn.png").write_bytes(b"no picture")
    spec = InputSpec(8, (0.5,) * 3, (0.5,) * 3, "bicubic", lambda texts: [], 0, 8)
    batches = LabelledBatches(opened(tmp_path / "s"), spec, range(1, 5), 3)
    assert [batches[n].places for n in range(len(batches))] == [[1, 2, 3], [4]]
    assert [int(row[0, 0, 0]) for row in batches[0].pixels] == [20, 40, 60]
    (batch,) = LabelledBatches(opened(tmp_path / "folders"), spec, range(2), 8)
    assert batch.places == [0]
    assert "torn.png" in batch.damaged[0]


REFUSED = {
    "a number outside": ({"a.cls": b"3"}, r"sample a has the label 3, which is none of the 3 .*"),
    "a name outside": ({"a.json": b'{"label": "cow"}'}, r"label cow, .* classes of names\.txt"),
    "no label": ({"a.json": b'{"captions": ["x"]}'}, r"sample a has no label; a sample says its"),
    "a wrong json": ({"a.json": b"{"}, r"sample a has no label"),
}


@pytest.mark.parametrize(("members", "told"), REFUSED.values(), ids=REFUSED)
def test_a_label_that_is_no_class_is_named(tmp_path, png, members, told):
    write_tar(tmp_path / "s" / "0.tar", {"a.png": png, **members})
    with pytest.raises(DataError, match=r"^eval\.sets\.pets\.data: .*" + told):
        opened(tmp_path / "s")


def test_a_shard_that_ends_inside_a_label_is_named(tmp_path, png):
    shard = tmp_path / "s" / "0.tar"
    write_tar(shard, {"a.png": png, "a.cls": b"0", "b.png": png, "b.cls": b"1"})
    content = shard.read_bytes()
    shard.write_bytes(content[: content.rindex(b"b.cls") + 512])
    with pytest.raises(DataError, match=r"0\.tar: .*; fetch or pack the shard again"):
        opened(tmp_path / "s")


def test_what_is_no_labelled_set_is_refused(tmp_path, png):
    write_tar(tmp_path / "s" / "0.tar", {"a.cls": b"0"})
    picture(tmp_path / "folders" / "cow" / "x.png")
    (tmp_path / "none" / "cat").mkdir(parents=True)
    for where, told in (
        (tmp_path / "s", "sample a has no image"),
        (tmp_path / "folders", "cow has the label cow"),
        (tmp_path / "none", "its folders hold no image"),
        (tmp_path / "nowhere", "no shard matches"),
        ("https://x.org/{0..3}.tar", "read from this machine"),
    ):
        with pytest.raises(DataError, match=re.escape(told)) as caught:
            opened(where)
        assert len(str(caught.value).splitlines()) == 1
