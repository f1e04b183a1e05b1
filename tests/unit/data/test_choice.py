"""`data.keys`: which members of foreign shards are images and captions, everywhere alike."""

import collections
import io
import json
import tarfile
from itertools import islice

import pytest
from PIL import Image
from pydantic import ValidationError

from mmscale.config.data import KeysConfig
from mmscale.config.load import load_config
from mmscale.contracts import Position, World
from mmscale.data.choice import parse_choice
from mmscale.data.far import Far
from mmscale.data.forward import Reading, read_through
from mmscale.data.index import IndexSettings, index
from mmscale.data.manifest import read_manifest, sealed
from mmscale.data.members import describe_members
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import Schedule, plan_schedule
from mmscale.data.shards import open_shards, open_train
from mmscale.data.stream import TrainStream
from mmscale.data.tar import TarSample, walk_shard
from mmscale.data.verify import verify
from mmscale.errors import ConfigError, DataError
from tests.unit.data.tars import add
from tests.unit.data.test_two_sources import SPEC


def picture(number, form="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 60, 90)).save(buffer, form)
    return buffer.getvalue()


JSON = {"caption": "said", "re_caption": ["told", "told again"], "dc:title": "titled", "none": ""}
MEMBERS = {
    "img": picture(1, "PNG"),
    "jpg": picture(2),
    "txt": b"one\ntwo\n\n",
    "blip.txt": b"machine",
    "json": json.dumps(JSON).encode(),
}
# What is chosen; the image's member; captions; counts and shares.
CHOICES = {
    "image: [img]": ("img", ("alone",), ()),
    "image: [.PNG, img]": ("img", ("alone",), ()),
    "image: ['*']": ("img", ("alone",), ()),
    "json: [caption]": ("jpg", ("said",), ()),
    "json: ['dc:title']": ("jpg", ("titled",), ()),
    "json: [caption, re_caption:0.3]": (
        "jpg",
        ("said", "told", "told again"),
        ((1, 0.7), (2, 0.3)),
    ),
    "{text: [txt], lines: true}": ("jpg", ("one", "two"), ()),
    "{text: [blip.txt:0.25, txt], json: [none, caption]}": (
        "jpg",
        ("machine", "one\ntwo\n\n", "said"),
        ((1, 0.25), (1, 0.25), (1, 0.25)),
    ),
}


def tar_of(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ending, content in members.items():
                add(tar, f"{key}.{ending}", content)
    return path


def indexed(paths, choice):
    return index(paths, settings=IndexSettings(choice=choice))


@pytest.mark.parametrize("words", CHOICES)
def test_manifests_readers_and_shards_without_one_agree_on_what_is_chosen(tmp_path, words):
    image, captions, shares = CHOICES[words]
    choice = parse_choice(words)
    # Of the usual text only a whole shard tells whether its lines are captions.
    members = {**MEMBERS, "txt": b"alone"} if choice.keys.image else MEMBERS
    path = tar_of(tmp_path / "s" / "0.tar", {f"{n:03d}": members for n in range(3)})
    indexed([path], choice)
    manifest = read_manifest(path.parent)
    assert [list(shard.captions) for shard in manifest.shards] == [[len(captions)] * 3]
    assert manifest.keys == choice.keys
    assert verify(path.parent) == []
    shards = open_shards("x", str(path.parent))
    read = [SampleReader(shards).read(0, number) for number in range(3)]
    forward = list(read_through(path, Far(), Reading(choice=choice)))
    with path.open("rb") as file:
        walked = [describe_members(s, None, choice) for s in walk_shard(file, choice.wanted)]
    for number, sample in enumerate(walked):
        assert sample.fault is None
        assert sample.image == MEMBERS[image]
        assert sample.captions == captions
        assert [count for count, _ in sample.shares] == [count for count, _ in shares]
        assert [share for _, share in sample.shares] == pytest.approx([s for _, s in shares])
        for other in (read[number], forward[number]):
            assert (other.image, other.captions, other.shares, other.key) == (
                sample.image, sample.captions, sample.shares, sample.key
            )  # fmt: skip


def test_what_nobody_chose_is_not_read_and_the_usual_names_stay():
    assert "txt" not in parse_choice("json: [caption]").wanted
    assert "txt" in parse_choice("image: [img]").wanted
    usual = describe_members(TarSample("k", members=dict(MEMBERS), suffixes=list(MEMBERS)))
    assert usual.image == MEMBERS["jpg"]


FAULTS = {
    "image: [gif]": "has no image: its members end in img, jpg, txt, blip.txt, json, not in gif",
    "json: [alt, none]": "has no caption in alt, none: it has ",
    "text: [cap]": "has no caption in cap: it has ",
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_sample_without_what_is_chosen_says_what_it_has(tmp_path, words):
    path = tar_of(tmp_path / "0.tar", {"a": MEMBERS})
    with pytest.raises(DataError, match="no shard holds a sample") as raised:
        indexed([path], parse_choice(words))
    assert FAULTS[words] in str(raised.value)


def test_an_unknown_image_is_told_with_its_repair():
    found = TarSample("a", suffixes=["img", "txt"], members={"txt": b"x"})
    assert "if `img` is one, index with --keys 'image: [...]'" in describe_members(found).fault


@pytest.fixture
def folder(tmp_path):
    samples = {
        f"{n:03d}": {
            "img": picture(n),
            "json": json.dumps({"a": f"a{n}", "b": [f"b{n}", f"B{n}"], "image_id": n}).encode(),
        }
        for n in range(40)
    }
    tar_of(tmp_path / "s" / "0.tar", samples)
    indexed([tmp_path / "s" / "0.tar"], parse_choice("{image: [img], json: [a, b:0.25]}"))
    return tmp_path / "s"


def _config(folder, *words):
    return load_config(["demo", f"data.train={folder}", "train.global_batch_size=4", *words])


def test_a_run_reads_as_was_indexed_takes_other_shares_and_refuses_other_names(folder):
    bare = open_train(_config(folder).data)
    again = open_train(_config(folder, "data.keys={image: [img], json: [a, b:0.25]}").data)
    other = open_train(_config(folder, "data.keys={image: [img], json: [a:0.5, b]}").data)
    assert bare.choices == again.choices
    assert other.choice(0).fields == [("a", 0.5), ("b", 0.5)]
    assert len({bare.digest, other.digest}) == 2
    with pytest.raises(DataError, match=r"data.keys \(json: a\).*mmscale index with these --keys"):
        open_train(_config(folder, "data.keys={json: [a]}").data)
    plain = tar_of(folder.parent / "p" / "0.tar", {"a": {"jpg": picture(1), "txt": b"x"}})
    index([plain])
    with pytest.raises(DataError, match="counts other members"):
        open_train(_config(plain.parent, "data.keys={json: [a]}").data)


def test_a_manifest_with_a_choice_is_of_a_version_of_its_own(folder):
    content = json.loads((folder / "manifest.json").read_text())
    assert content["version"] == 3
    indexed([folder / "0.tar"], parse_choice("{image: [img], json: [a]}"))
    assert read_manifest(folder).keys.json == ("a",)


def _picks(plan, shares, keys=400, epochs=5, turn=0):
    return [
        plan.pick(f"k{key}", 3, epoch, turn, shares=shares)
        for key in range(keys)
        for epoch in range(epochs)
    ]


def test_a_place_is_drawn_by_its_share_anew_each_epoch():
    """2,000 draws: within four standard deviations of the binomial."""
    shares = ((1, 0.75), (2, 0.25))
    plan = Schedule([], "random", 7, 1, 1, 1)
    picks = _picks(plan, shares)
    counts = collections.Counter(pick for (pick,) in picks)
    assert abs(counts[0] - 1500) < 4 * (2000 * 0.75 * 0.25) ** 0.5
    assert abs(counts[1] - counts[2]) < 4 * 500**0.5
    assert picks == _picks(plan, shares)
    by_key = [{pick for (pick,) in picks[start : start + 5]} for start in range(0, 2000, 5)]
    assert sum(len(found) > 1 for found in by_key) > 200
    assert picks != _picks(plan, shares, turn=1)


def test_rows_of_one_turn_are_of_one_place_and_every_caption_is_a_row_where_flat():
    shares = ((2, 0.5), (2, 0.5))
    pairs = Schedule([], 2, 7, 1, 1, 1)
    found = {tuple(sorted(pairs.pick(f"k{n}", 4, 0, 0, shares=shares))) for n in range(60)}
    assert found == {(0, 1), (2, 3)}
    flat = Schedule([], "flat", 7, 1, 1, 1)
    turns = [flat.pick("k", 4, 0, turn, shares=shares)[0] for turn in range(4)]
    assert sorted(turns) == [0, 1, 2, 3]
    assert Schedule([], "first", 7, 1, 1, 1).pick("k", 4, 0, 0, shares=shares) == [0]


def test_the_stream_draws_what_the_schedule_does(folder):
    config = _config(folder, "data.workers=0")
    shards = open_train(config.data)
    plan = plan_schedule(config, shards, 2)
    stream = TrainStream(config, shards, plan, SPEC, World())
    drawn = collections.Counter()
    for batch, _ in islice(stream.batches(Position()), 60):
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            name, _, choice = key.partition("#")
            assert caption == [f"a{int(name)}", f"b{int(name)}", f"B{int(name)}"][int(choice)]
            drawn[caption[0]] += 1
    # 240 draws, a quarter of the second place.
    assert abs(drawn["a"] - 180) < 4 * (240 * 0.25 * 0.75) ** 0.5
    assert drawn["b"] > 10 < drawn["B"]


def test_shares_without_effect_and_caches_that_do_not_know_them_are_refused(folder, tmp_path):
    keys = "data.keys={image: [img], json: [a, b:0.25]}"
    for words, fault in (
        ((keys, "data.captions=flat"), "data.captions=flat draws none of them"),
        ((keys, "data.captions=first"), "data.captions=first draws none of them"),
    ):
        config = _config(folder, *words)
        with pytest.raises(ConfigError, match=fault):
            plan_schedule(config, open_train(config.data), 2)
    config = _config(folder)
    data = config.data.model_copy(update={"feature_cache": str(tmp_path)})
    with pytest.raises(ConfigError, match="keeps captions without the shares"):
        plan_schedule(config.model_copy(update={"data": data}), open_train(data), 2)


def test_a_resampled_run_is_told_by_data_keys_alone(folder):
    config = _config(folder, "data.resampled=true", "data.keys={image: [img], json: [b]}")
    plan = plan_schedule(config, open_train(config.data), 2)
    items = [item for lane in plan.epoch(0) for item in lane.items()]
    assert {len(item.content.captions) for item in items} == {2}
    assert all(item.content.captions[0].startswith("b") for item in items)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("json: [a:0.7, b:0.4]", "above 0 and 1 together"),
        ("json: [a:0.7, b:0.2]", "above 0 and 1 together"),
        ("{text: [txt:1.0], json: [b]}", "above 0 and 1 together"),
        ("json: [a:0]", "above 0 and 1 together"),
        ("json: [a:-1, b]", "above 0 and 1 together"),
        ("image: [jpg, .JPG]", "names one twice"),
        ("json: [a, a:0.5]", "names one twice"),
        ("json: ['']", "a name is empty"),
        ("lines: true", "lines is of the captions in text and json"),
        ("video: [mp4]", "Extra inputs"),
        ("[", "no YAML"),
        ("jpg", "--keys jpg"),
    ],
)
def test_a_choice_that_is_none_is_refused(words, fault):
    with pytest.raises(ConfigError, match=r"--keys .*write names for image") as raised:
        parse_choice(words)
    assert fault in str(raised.value)


def test_a_manifest_is_no_place_for_other_choices(folder):
    with pytest.raises(ValidationError):
        KeysConfig.model_validate({"json": [1]})
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(sealed({**content, "keys": {"json": "a"}}))
    with pytest.raises(DataError, match="keys names no members"):
        read_manifest(folder)


def test_lines_of_the_usual_text_are_captions_beside_a_chosen_image(tmp_path):
    path = tar_of(tmp_path / "s" / "0.tar", {"a": {"img": picture(1), "txt": b"one\ntwo\n"}})
    indexed([path], parse_choice("image: [img]"))
    sample = SampleReader(open_shards("x", str(path.parent))).read(0, 0)
    assert (sample.captions, sample.image) == (("one", "two"), picture(1))
