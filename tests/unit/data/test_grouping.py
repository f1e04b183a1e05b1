"""Which images count as one, from the table of a data set to the rows of a batch."""

import io
import json
import tarfile
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmscale.config.load import load_config
from mmscale.contracts import InputSpec, Position, World
from mmscale.data.grouping import Trait, join, normal_caption
from mmscale.data.index import index
from mmscale.data.manifest import read_manifest, write_manifest
from mmscale.data.pack import PackSettings, pack
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.data.stream import TrainStream
from mmscale.errors import DataError

SPEC = InputSpec(
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bicubic",
    tokenize=lambda captions: [[1, *map(ord, caption)] for caption in captions],
    pad_token=0,
    context_length=64,
)
# name, caption, label, group; a and b say the same, c and d too.
ROWS = (
    ("a.png", "A red square.", "square", "g1"),
    ("b.png", "a RED square", "square", "g1"),
    ("c.png", "A Dog   runs!", "dog", ""),
    ("d.png", "a dog runs", "", "g2"),
    ("e.png", "a cat", "cat", "g2"),
    ("f.png", "a bird", "bird", ""),
)
COLOURS = {"a": "red", "b": "orange", "c": "blue", "d": "green", "e": "white", "f": "black"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A Dog  runs.", "a dog runs"),
        ("T-shirt", "t shirt"),
        ("“quoted”", '"quoted"'),
        ("ﬁne Ⅳ", "fine iv"),
        ("STRASSE", "straße"),
        ("a\tb\n", "a b"),
    ],
)
def test_captions_in_other_dress_are_equal(one, other):
    assert normal_caption(one) == normal_caption(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a dog", "a dogs"), ("!!!", "???"), ("की", "का"), ("dog 🐕", "dog 🐈"), ("3 + 4", "3 4")],
)
def test_captions_that_say_something_else_are_not(one, other):
    assert normal_caption(one) != normal_caption(other)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(100, 120), max_size=4)), max_size=40
    )
)
def test_a_group_is_all_that_hangs_together_and_its_id_the_smallest_image_id(samples):
    traits = [Trait(image, tuple(joints), None, None) for image, joints in samples]
    cut = len(traits) // 3
    (first, second), _ = join([traits[:cut], traits[cut:]])
    expected = []
    for start in range(len(traits)):
        reached, frontier = {start}, [start]
        while frontier:
            one = traits[frontier.pop()]
            links = {one.image, *one.joints}
            for place, other in enumerate(traits):
                if place not in reached and links & {other.image, *other.joints}:
                    reached.add(place)
                    frontier.append(place)
        expected.append(min(traits[place].image for place in reached))
    assert [*first.captions, *second.captions] == expected


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 16), colour).save(folder / "images" / f"{name}.png")
    lines = ["image,caption,label,group", *(",".join(row) for row in ROWS)]
    (folder / "captions.csv").write_text("\n".join(lines))
    pack(folder, folder / "packed", PackSettings(split="train", samples_per_shard=4))
    return folder / "packed"


def rows_of(packed, *words):
    """Rows of one epoch by key: match id and label."""
    config = load_config(
        [
            "demo",
            f"data.train={packed}",
            "train.global_batch_size=6",
            "data.lanes=1",
            "data.workers=0",
            *words,
        ]
    )
    shards = open_train(config.data)
    stream = TrainStream(config, shards, plan_schedule(config, shards, 1), SPEC, World())
    (batch,) = (batch for batch, _ in islice(stream.batches(Position()), 1))
    ids = zip(batch.keys, batch.image_ids, batch.match_ids, batch.labels, strict=True)
    return {key[0]: (int(i), int(m), int(label)) for key, i, m, label in ids}


def partition(rows):
    groups = {}
    for key, (_, match, _) in rows.items():
        groups.setdefault(match, set()).add(key)
    return sorted("".join(sorted(group)) for group in groups.values())


@pytest.mark.parametrize(
    ("match", "groups"),
    [
        ("image", ["a", "b", "c", "d", "e", "f"]),
        ("caption", ["ab", "cd", "e", "f"]),
        ("group", ["ab", "c", "de", "f"]),
    ],
)
def test_match_ids_of_a_batch(packed, match, groups):
    rows = rows_of(packed, f"data.match={match}")
    assert partition(rows) == groups
    if match == "image":
        assert all(image == matched for image, matched, _ in rows.values())


def test_named_labels_are_numbered_and_the_names_kept(packed):
    manifest = read_manifest(packed)
    assert manifest.classes == ("bird", "cat", "dog", "square")
    labels = {key: label for key, (_, _, label) in rows_of(packed).items()}
    assert labels == {"a": 3, "b": 3, "c": 2, "d": -1, "e": 1, "f": 0}
    with tarfile.open(packed / "train-000000.tar") as tar:
        assert json.load(tar.extractfile("a.json"))["label"] == 3


def test_index_of_packed_shards_gives_the_same_manifest(packed):
    before = (packed / "manifest.json").read_bytes()
    index(packed.glob("*.tar"))
    assert (packed / "manifest.json").read_bytes() == before


def test_a_manifest_without_identities_serves_image_ids_only(packed, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for path in packed.glob("*.tar"):
        (old / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(packed)
    bare = tuple(replace(shard, identities=None) for shard in manifest.shards)
    write_manifest(old, replace(manifest, shards=bare))
    assert {key: ids[:2] for key, ids in rows_of(old).items()} == {
        key: ids[:2] for key, ids in rows_of(packed).items()
    }
    with pytest.raises(DataError, match=r"data\.match=caption .*mmscale index"):
        rows_of(old, "data.match=caption")
    with pytest.raises(DataError, match=r"data\.positive_share .*mmscale index"):
        rows_of(old, "data.positive_share=0")
    index(old.glob("*.tar"))
    assert partition(rows_of(old, "data.match=caption")) == ["ab", "cd", "e", "f"]


def test_groups_are_missed_by_name(synthetic):
    with pytest.raises(DataError, match=r"no image of data\.train has a group"):
        rows_of(synthetic.train, "data.match=group")


def test_names_in_shards_made_elsewhere_are_numbered_by_index(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, label in (("x", "dog"), ("y", 7), ("z", None), ("w", ["list"])):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), "red" if key == "x" else "blue").save(file, "PNG")
            fields = {"captions": [key], "label": label, "group": 4}
            for suffix, content in (
                ("png", file.getvalue()),
                ("json", json.dumps(fields).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    manifest = index([tmp_path / "0.tar"])
    assert manifest.classes == ("7", "dog")
    identities = manifest.shards[0].identities
    assert identities.labels == (1, 0, -1, -1)
    assert len(set(identities.groups)) == 1
    x, *others = identities.captions
    assert x == identities.images[0]
    # Equal content joins the others.
    assert set(others) == {min(identities.images[1:])}


def test_the_synthetic_pairs_say_what_their_main_object_is(synthetic):
    labels = [
        label
        for shard in read_manifest(synthetic.train).shards
        for label in shard.identities.labels
    ]
    listed = json.loads((synthetic.source / "dataset_flickr30k.json").read_text())["images"]
    assert labels == [entry["label"] for entry in listed if entry["split"] == "train"]
    assert set(labels) == set(range(8))
