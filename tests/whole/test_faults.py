"""Damaged data: each kind is named, ends as it should, harms nothing and costs no good sample."""

import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.config.load import load_config
from mmscale.contracts import InputSpec, Position, World
from mmscale.data.manifest import read_manifest
from mmscale.data.pack import pack
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.data.stream import TrainStream
from mmscale.errors import explained, printable
from mmscale.model.openclip_tokens import read_tokenize
from tests.whole.damage import Place
from tests.whole.faults_manifest import FAULTS as MANIFESTS
from tests.whole.faults_shards import FAULTS as SHARDS
from tests.whole.faults_sources import FAULTS as SOURCES
from tests.whole.faults_sources import good_source

SECONDS = 30
FAULTS = [*SHARDS, *MANIFESTS, *SOURCES]


class HangsError(BaseException):
    """Not an Exception, so that nothing that tolerates damage tolerates this."""


@contextmanager
def ends_in(seconds: int) -> Iterator[None]:
    def hang(*_):
        raise HangsError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def spec():
    tokenize, pad_token = read_tokenize("ViT-B-32", 77, {})
    return InputSpec(32, (0.5,) * 3, (0.5,) * 3, "bicubic", tokenize, pad_token, 77)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The good pictures in two shards, with a manifest."""
    folder = tmp_path_factory.mktemp("good")
    good_source(folder / "source")
    pack(folder / "source", folder / "packed", "train", samples_per_shard=2)
    return folder / "packed"


@pytest.fixture
def place(tmp_path):
    for name in ("data", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret.jpg").write_bytes(b"nobody may have this")
    return Place(tmp_path / "data", tmp_path / "outside", tmp_path / "outside" / "canary")


def surroundings(place):
    """Everything beside the damaged folder and what is packed from it."""
    base = place.folder.parent
    found = {}
    for folder, _, files in os.walk(base):
        path = Path(folder)
        if not {place.folder, base / "out"} & {path, *path.parents}:
            found |= {path / name: (path / name).stat().st_mtime_ns for name in files}
    return found


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mmscale", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def stream(where, spec, delivered, *words):
    """An epoch of training data; its keys."""
    settings = ["data.workers=0", "data.lanes=1", "data.captions=first", "train.global_batch_size=1"]
    config = load_config(["demo", f"data.train={where}", *settings, *words])
    shards = open_train(config.data)
    schedule = plan_schedule(config, shards, 1)
    batches = TrainStream(config, shards, schedule, spec, World()).batches(Position())
    damaged = 0
    for batch, _ in islice(batches, schedule.steps):
        damaged += len(batch.damaged)
        sys.stderr.write("".join(f"{printable(line)}\n" for line in batch.damaged))
        if not batch.damaged:
            delivered.update(key.rpartition("#")[0] for key in batch.keys)
    return 0


def packed_keys(out):
    """Keys of the pictures that a pack holds, over all splits."""
    keys = set()
    for path in out.glob("*/manifest.json"):
        settings = ["demo", f"data.train={path.parent}"]
        shards = open_train(load_config(settings).data)
        reader = SampleReader(shards)
        for number, shard in enumerate(read_manifest(path.parent).shards):
            keys |= {reader.read(number, sample).key for sample in range(shard.samples)}
    return keys


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named_and_costs_no_good_sample(
    fault, place, packed, spec, monkeypatch, capsys
):
    if fault.packed:
        shutil.copytree(packed, place.folder, dirs_exist_ok=True)
    fault.make(place)
    before, out = surroundings(place), place.folder.parent / "out"
    for verb, code, words in fault.steps:
        delivered: set[str] = set()
        with ends_in(SECONDS):
            if verb == "stream":
                where = place.folder if fault.where is None else fault.where
                ended = explained(lambda: stream(where, spec, delivered, *fault.settings))
            elif verb == "index":
                tars = sorted(place.folder.glob("*.tar")) or [place.folder / "*.tar"]
                ended = command(monkeypatch, verb, *tars, "--workers", 1)
            elif verb == "verify":
                ended = command(monkeypatch, verb, place.folder, "--workers", 1)
            else:
                source = place.folder if fault.where is None else place.folder / fault.where
                ended = command(monkeypatch, verb, source, "--out", out, "--workers", 1)
                if ended == 0:
                    delivered = packed_keys(out)
        said = "".join(capsys.readouterr())
        said += "".join(path.read_text() for path in out.glob("*/rejected.txt"))
        assert ended == code, said
        for word in words:
            assert word in said, said
        assert printable(said) == said
        if verb in ("stream", "pack") and ended == 0:
            assert delivered == {key.replace("OUTSIDE", str(place.outside)) for key in fault.keys}
    assert surroundings(place) == before
    assert io


def test_there_are_many_kinds():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 100
