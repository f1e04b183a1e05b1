"""Every file of a packed folder, damaged at random: nothing passes, nothing ends in a traceback."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest

from mmscale.config.load import load_config
from mmscale.contracts import InputSpec, Position, World
from mmscale.data.manifest import read_manifest
from mmscale.data.pack import PackSettings, pack
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.data.stream import TrainStream
from mmscale.data.synth import SynthSettings, render
from mmscale.data.verify import verify, verify_all
from mmscale.errors import DataError

SPEC = InputSpec(
    image_size=16,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bicubic",
    tokenize=lambda captions: [[1, *map(ord, caption[:9])] for caption in captions],
    pad_token=0,
    context_length=16,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    render(folder / "source", SynthSettings(7, seed=0, size=32, val=0, test=0))
    pack(folder / "source", folder / "packed", PackSettings(split="train", samples_per_shard=3))
    return folder / "packed"


@dataclass(frozen=True)
class Change:
    """One accident: a bit turned, the rest cut off, a stretch lost."""

    file: str
    kind: str
    place: int
    length: int

    @classmethod
    def drawn(cls, draw, sizes):
        file = draw.choice(sorted(sizes))
        size = sizes[file]
        return cls(
            file,
            draw.choice(("bit", "cut", "gap")),
            draw.randrange(size),
            draw.choice((1, draw.randrange(1, 64), draw.randrange(1, size + 1))),
        )

    def apply(self, content):
        if self.kind == "cut":
            return content[: self.place]
        if self.kind == "gap":
            return content[: self.place] + content[self.place + self.length :]
        turned = bytearray(content)
        turned[self.place] ^= 1 << self.length % 8
        return bytes(turned)


def train(folder):
    """An epoch of training rows: their keys with captions and ids."""
    config = load_config(
        ["demo", f"data.train={folder}", "data.workers=0", "train.global_batch_size=7",
         "data.augment=none", "data.captions=flat", "data.max_damaged=1", "data.lanes=1",
         "data.match=caption"]
    )  # fmt: skip
    shards = open_train(config.data)
    schedule = plan_schedule(config, shards, 1)
    batches = TrainStream(config, shards, schedule, SPEC, World(0, 1)).batches(Position())
    rows = Counter()
    for batch, _ in islice(batches, schedule.steps):
        rows.update(
            zip(batch.keys, batch.image_ids.tolist(), batch.match_ids.tolist(), strict=True)
        )
    return rows


def trained_or_refused(folder):
    """None where a sentence says that it cannot be trained on."""
    try:
        return train(folder)
    except DataError:
        return None


def fuzz(packed, folder, seed, count):
    """What was found of so many changes; what passed comes back."""
    draw = random.Random(seed)
    originals = {path.name: path.read_bytes() for path in packed.iterdir()}
    sizes = {name: len(content) for name, content in originals.items()}
    for name, content in originals.items():
        (folder / name).write_bytes(content)
    sound = train(folder)
    assert verify(folder) == []
    passed, ends = [], Counter()
    for _ in range(count):
        change = Change.drawn(draw, sizes)
        content = change.apply(originals[change.file])
        if content == originals[change.file]:
            continue
        (folder / change.file).write_bytes(content)
        # Whatever else is raised is a traceback, and fails the test.
        faults = verify_all(folder)
        ends[change.kind, change.file.endswith(".json")] += 1
        if not faults or any("\n" in fault for fault in faults):
            passed.append(change)
        rows = trained_or_refused(folder)
        ends["refused" if rows is None else "trained"] += 1
        # A manifest that changed is never believed; whose image a row is, is right where a tar did.
        if rows is not None and (change.file.endswith(".json") or not set(rows) <= set(sound)):
            passed.append(change)
        (folder / change.file).write_bytes(originals[change.file])
    return passed, ends


def test_no_accident_passes(packed, tmp_path):
    passed, ends = fuzz(packed, tmp_path, 0, 60)
    assert passed == []
    assert ends["refused"] > 20


@pytest.mark.soak
def test_no_accident_of_500_passes(packed, tmp_path):
    passed, ends = fuzz(packed, tmp_path, 1, 500)
    print(dict(ends))
    assert passed == []


def test_every_byte_of_a_manifest_counts(packed, tmp_path):
    """Each byte of what is no long list, and of the seal itself."""
    content = (packed / "manifest.json").read_bytes()
    for place in [*range(200), *range(len(content) - 120, len(content))]:
        turned = bytearray(content)
        turned[place] ^= 1 << place % 8
        (tmp_path / "manifest.json").write_bytes(turned)
        with pytest.raises(DataError, match=r"manifest\.json"):
            read_manifest(tmp_path, lazily=True)


def test_a_manifest_of_the_version_before_is_read_and_verify_says_so(packed, tmp_path):
    content = json.loads((packed / "manifest.json").read_text())
    wanted = read_manifest(packed)
    for path in packed.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    notes = []
    assert verify_all(packed, note=notes.append) == []
    assert notes == []
    del content["digest"]
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "version": 1}))
    assert read_manifest(tmp_path) == wanted
    assert verify_all(tmp_path, note=notes.append) == []
    (note,) = notes
    assert "without a digest of itself" in note
