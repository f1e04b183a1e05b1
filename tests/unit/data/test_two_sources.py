"""Whose image it is: an id says so within its source only, wherever ids are compared."""

import io
import json
import random
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmscale.config.data import SourceConfig
from mmscale.config.load import load_config
from mmscale.contracts import InputSpec, Position, World
from mmscale.data.index import index
from mmscale.data.manifest import read_manifest, write_manifest
from mmscale.data.reader import SampleReader
from mmscale.data.resampled import plan_resampling
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards, open_train, scopes_of
from mmscale.data.stream import TrainStream
from mmscale.diagnostics.retrieval import recalls
from mmscale.engine.encode import Encoder, encode
from mmscale.engine.inference import Inference
from mmscale.errors import DataError
from mmscale.evaluation.retrieval import embed
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from tests.ranks.tiny import tiny_config
from tests.unit.data.tars import add

SPEC = InputSpec(
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bicubic",
    tokenize=lambda captions: [[1, *map(ord, caption)] for caption in captions],
    pad_token=0,
    context_length=64,
)
WORDS = ("red", "green", "blue", "dog", "cat", "bird", "runs", "sits", "near", "snow", "tree")
# What the KEY.json of the n-th image holds besides its captions.
KINDS = {
    "keys": lambda number: {},
    "ids": lambda number: {"image_id": number},
    "groups": lambda number: {"image_id": number, "group": f"g{number // 2}"},
}


def picture(noise):
    buffer = io.BytesIO()
    colours = np.frombuffer(noise.randbytes(48), np.uint8).reshape(4, 4, 3)
    Image.fromarray(colours).resize((16, 16), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, seed, images=8, kind="keys", shards=2):
    """A folder as tools make it: keys from 000000000 on, one to five captions an image."""
    noise = random.Random(seed)
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * images // shards, (shard + 1) * images // shards):
                captions = [" ".join(noise.choices(WORDS, k=6)) for _ in range(1 + number % 5)]
                fields = {"captions": captions, **KINDS[kind](number)}
                add(tar, f"{number:09d}.json", json.dumps(fields).encode())
                add(tar, f"{number:09d}.png", picture(noise))
    index(sorted(folder.glob("*.tar")))
    return folder


@pytest.fixture(params=KINDS)
def pair(tmp_path, request):
    """Two folders whose samples bear the same keys and ids."""
    return [write(tmp_path / name, name, kind=request.param) for name in ("cc3m", "cc12m")]


def read_ids(shards):
    reader = SampleReader(shards)
    return [
        reader.read(shard, sample).image_id
        for shard, record in enumerate(shards.shards)
        for sample in range(record.samples)
    ]


def listed_ids(shards):
    return [image for shard in shards.shards for image in shard.identities.images]


def test_equal_ids_of_two_folders_are_two_images(pair):
    one, other = map(str, pair)
    alone = {where: read_ids(open_shards("data.eval", where)) for where in (one, other)}
    assert set(alone[one]) == set(alone[other])
    ways = {
        "list": [one, other],
        "globs": [f"{one}/*.tar", f"{other}/*.tar"],
        "braces": "{" + one + "," + other + "}/{00000,00001}.tar",
        "sources": [SourceConfig(shards=one, weight=2), SourceConfig(shards=other)],
    }
    for where in ways.values():
        shards = open_shards("data.train", where)
        ids = read_ids(shards)
        assert len(set(ids)) == 16
        assert all(0 <= number < 2**63 for number in ids)
        assert ids == listed_ids(shards)
    # Whose image it is does not depend on what else is opened, and in which order.
    backwards = read_ids(open_shards("data.train", [other, one]))
    assert backwards == ids[8:] + ids[:8]


def test_one_folder_keeps_its_ids_however_it_is_named(pair, tmp_path):
    """Through a link, copied elsewhere: these are the same images."""
    raw = read_manifest(pair[0])
    wanted = [image for shard in raw.shards for image in shard.identities.images]
    link, copied = tmp_path / "link", tmp_path / "copied"
    link.symlink_to(pair[0])
    shutil.copytree(pair[0], copied)
    for where in (str(pair[0]), str(link), [str(copied), str(pair[0])]):
        shards = open_shards("data.train", where)
        assert read_ids(shards) == listed_ids(shards) == wanted * (len(shards.paths) // 2)


def test_manifests_from_before_identities_were_kept(pair):
    for folder in pair:
        content = json.loads((folder / "manifest.json").read_text())
        for shard in content["shards"]:
            del shard["identities"]
        # As it was before there were digests.
        del content["digest"]
        content["version"] = 1
        (folder / "manifest.json").write_text(json.dumps(content))
    assert len(set(read_ids(open_shards("data.eval", list(map(str, pair)))))) == 16


@pytest.mark.parametrize("match", ["image", "caption", "group"])
def test_no_two_sources_share_a_positive(tmp_path, match):
    """Rows of a batch are positives of each other within their source only."""
    kind = "groups" if match == "group" else "ids"
    folders = [write(tmp_path / name, name, kind=kind) for name in ("a", "b")]
    config = load_config(
        ["demo", f"data.train=[{folders[0]},{folders[1]}]", "data.workers=0",
         "train.global_batch_size=16", f"data.match={match}", "data.augment=none"]
    )  # fmt: skip
    shards = open_train(config.data)
    schedule = plan_schedule(config, shards, 1)
    batch, _ = next(TrainStream(config, shards, schedule, SPEC, World(0, 1)).batches(Position()))
    assert len(batch.image_ids.unique()) == 16
    distinct = len(batch.match_ids.unique())
    assert distinct == (8 if match == "group" else 16)
    # Each image's match id is that of an image or group of its own source.
    by_source = [set(open_shards("x", str(f)).shards[0].identities.images) for f in folders]
    assert by_source[0] == by_source[1]
    halves = [set(), set()]
    for image, matched in zip(batch.image_ids.tolist(), batch.match_ids.tolist(), strict=True):
        own = [image in listed_ids(part) for part in _parts(shards)]
        halves[own.index(True)].add(matched)
    assert not halves[0] & halves[1]


def _parts(shards):
    """The set's shards, those of one folder each."""
    return [replace(shards, shards=shards.shards[:2]), replace(shards, shards=shards.shards[2:])]


def brute_force(image, text, owners):
    """Recalls by looping; `owners`: for each caption the row of its image. Ties count against."""
    similarity = image @ text.T
    of_images = [
        max(
            sum(similarity[i][j] >= similarity[i][own] for j in range(len(text)) if owners[j] != i)
            < k
            for own in range(len(text))
            if owners[own] == i
        )
        for k in (1, 5, 10)
        for i in range(len(image))
    ]
    of_texts = [
        sum(
            similarity[i][j] >= similarity[owners[j]][j]
            for i in range(len(image))
            if i != owners[j]
        )
        < k
        for k in (1, 5, 10)
        for j in range(len(text))
    ]
    found = {}
    for name, hits, count in (("i2t", of_images, len(image)), ("t2i", of_texts, len(text))):
        for place, k in enumerate((1, 5, 10)):
            found[f"{name}_r{k}"] = 100 * np.mean(hits[place * count : (place + 1) * count])
    return found


def test_recalls_over_two_sources_equal_a_brute_force(pair):
    """Also with uneven numbers of captions an image."""
    shards = open_shards("data.eval", list(map(str, pair)))
    config = tiny_config()
    model, spec = build_model(config.model, None, 0)
    # Its vocabulary is a small one.
    words = lambda text: [sum(map(ord, word)) % 98 + 1 for word in text.split()]  # noqa: E731
    spec = replace(spec, tokenize=lambda captions: [words(caption) for caption in captions])
    cpu = torch.device("cpu")
    inference = Inference(model, choose(config.engine))
    table = encode(Encoder(inference.call, cpu, spec, Alone(), 5), shards)
    pairs = embed(inference.call, cpu, table)
    counts = [1 + number % 5 for number in range(8)] * 2
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    assert pairs.text_ids.tolist() == [int(pairs.image_ids[owner]) for owner in owners]
    figures = recalls(pairs, Alone())
    assert (figures.pop("images"), figures.pop("captions")) == (16, sum(counts))
    wanted = brute_force(pairs.image.double().numpy(), pairs.text.double().numpy(), owners)
    assert figures == pytest.approx(wanted)
    assert 0 < figures["t2i_r1"] < 100


def test_what_a_feature_table_is_found_by_tells_sets_apart(pair):
    """Other sources beside it, or other ids and captions of the same shards."""
    one, both = open_shards("x", str(pair[0])), open_shards("x", list(map(str, pair)))
    assert one.digest != both.digest
    index(sorted(pair[0].glob("*.tar")))
    again = open_shards("x", str(pair[0]))
    assert (again.digest, again.described) == (one.digest, one.described)
    manifest = read_manifest(pair[0])
    for change in ({"captions": (2,) * 4}, {"identities": manifest.shards[0].identities ^ 1}):
        changed = replace(manifest.shards[0], **change)
        write_manifest(pair[0], replace(manifest, shards=(changed, manifest.shards[1])))
        other = open_shards("x", str(pair[0]))
        assert (other.digest == one.digest, other.described == one.described) == (True, False)


def labelled(folder, labels):
    """A folder whose samples have these labels."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, label in enumerate(labels):
            fields = {"captions": [f"a {label}"], "label": label}
            add(tar, f"{number:04d}.json", json.dumps(fields).encode())
            add(tar, f"{number:04d}.png", picture(random.Random(number)))
    index([folder / "a.tar"])
    return str(folder)


def test_classes_are_one_count_over_sources(tmp_path):
    """A name is one class in every source, whatever its number there."""
    one = labelled(tmp_path / "one", ["cat", "dog", "cat"])
    other = labelled(tmp_path / "other", ["dog", "ant", "cow"])
    numbers = labelled(tmp_path / "numbers", [0, 5])
    shards = open_shards("x", [one, other])
    assert [list(s.identities.labels) for s in shards.shards] == [[1, 3, 1], [3, 0, 2]]
    assert [list(s.identities.labels) for s in open_shards("x", [other]).shards] == [[2, 0, 1]]
    assert not shards.labels_clash
    assert open_shards("x", [one, numbers]).labels_clash


def test_classes_that_cannot_be_matched_are_refused(tmp_path):
    one, other = labelled(tmp_path / "one", ["cat", "dog"]), labelled(tmp_path / "b", [0, 1])
    words = ["demo", f"data.train=[{one},{other}]", "train.global_batch_size=2"]
    config = load_config(words)
    plan_schedule(config, open_train(config.data), 1)
    kinds = "loss.terms=[{kind: classification}]"
    config = load_config([*words, kinds, "model.fusion.classes=8"])
    with pytest.raises(DataError, match="names in one source"):
        plan_schedule(config, open_train(config.data), 1)


def drawn_ids(where):
    """Ids of what is drawn without a manifest: by source, shard and key."""
    config = load_config(["demo", f"data.train={where}", "data.resampled=true"])
    shards = open_train(config.data)
    found = {}
    for lane in plan_resampling(config.data, shards).lanes(2, 100, 4, 0, 0):
        for item in lane.items():
            path = shards.paths[item.shard]
            place = (path.parent.name, path.name, item.content.key)
            assert found.setdefault(place, item.content.image_id) == item.content.image_id
    return found


def test_without_a_manifest_a_key_counts_in_its_shard_and_an_id_in_its_source(tmp_path):
    for kind in ("keys", "ids"):
        for source in ("a", "b"):
            for shard in range(2):
                write(tmp_path / kind / f"{source}{shard}", f"{source}{shard}", kind=kind, shards=1)
                folder = tmp_path / kind / source
                folder.mkdir(exist_ok=True)
                (tmp_path / kind / f"{source}{shard}" / "00000.tar").rename(folder / f"{shard}.tar")
    # The same keys in four shards: 32 images; the same ids in two sources of two shards each: 16.
    for kind, images in (("keys", 32), ("ids", 16)):
        one, other = tmp_path / kind / "a", tmp_path / kind / "b"
        found = drawn_ids(f"[{one},{other}]")
        assert len(found) == 32
        assert len(set(found.values())) == images
        # The first source's do not change with what is read beside it, nor with where it lies.
        (tmp_path / kind).rename(tmp_path / f"moved-{kind}")
        alone = drawn_ids(tmp_path / f"moved-{kind}" / "a")
        assert alone == {place: number for place, number in found.items() if place[0] == "a"}
    assert sorted(set(alone.values())) == list(range(8))


def test_a_command_without_a_tars_name_is_a_source(tmp_path):
    folder = write(tmp_path / "a", 0, shards=1)
    commands = [f"pipe:cat '{folder}'/*", f"pipe:head -c 999999 '{folder}'/*"]
    assert scopes_of(commands) == [(0, ""), (1, "")]
