"""Damaged data: each kind is named, ends as it should, harms nothing and costs no good sample."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.config.load import load_config
from mmscale.contracts import InputSpec, Position, World
from mmscale.data.manifest import read_manifest
from mmscale.data.pack import PackSettings, pack
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_train
from mmscale.data.sources import records
from mmscale.data.stream import TrainStream
from mmscale.errors import DataError, explained, printable
from mmscale.model.openclip_towers import read_tokenize
from tests.whole.command import explain, run
from tests.whole.damage import END, Place, sample
from tests.whole.faults_manifest import FAULTS as MANIFESTS
from tests.whole.faults_shards import FAULTS as SHARDS
from tests.whole.faults_sources import FAULTS as SOURCES
from tests.whole.faults_sources import good_source
from tests.whole.small_run import ALONE, write_settings

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
    pack(folder / "source", folder / "packed", PackSettings(split="train", samples_per_shard=2))
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


def opened(where, spec, *words):
    """The training stream of a folder, and the steps of its epoch."""
    settings = [
        "data.workers=0",
        "data.lanes=1",
        "data.captions=first",
        "train.global_batch_size=1",
    ]
    config = load_config(["demo", f"data.train={where}", *settings, *words])
    shards = open_train(config.data)
    for shard in shards.shards:
        # Lists are read where they are needed, counts of captions with `flat`. The checks of types,
        # which only tests have, look into them too and would bury the sentence in their own.
        tuple(shard.captions)
    schedule = plan_schedule(config, shards, 1)
    return TrainStream(config, shards, schedule, spec, World()).batches(Position()), schedule.steps


def stream(where, spec, delivered):
    """Take an epoch of training data; 0, as a command that ends well."""
    batches, steps = opened(where, spec)
    for batch, _ in islice(batches, steps):
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
def test_a_fault_is_named_and_costs_no_good_sample(fault, place, packed, spec, monkeypatch, capsys):
    monkeypatch.setattr(records, "_UNPACKED_BYTES", 2**22)
    if fault.packed:
        shutil.copytree(packed, place.folder, dirs_exist_ok=True)
    fault.make(place)
    before, out = surroundings(place), place.folder.parent / "out"
    for verb, code, words in fault.steps:
        delivered: set[str] = set()
        with ends_in(SECONDS):
            if verb == "stream":
                where = place.folder if fault.where is None else fault.where
                ended = explained(partial(stream, where, spec, delivered))
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


def test_the_table_of_faults_has_at_least_150_kinds():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 150


@pytest.mark.parametrize(
    ("harm", "workers"),
    [(Path.unlink, 0), (lambda path: os.truncate(path, 2048), 0), (Path.unlink, 1)],
)
def test_a_shard_that_goes_in_mid_epoch_is_named(place, packed, spec, harm, workers):
    shutil.copytree(packed, place.folder, dirs_exist_ok=True)
    with ends_in(SECONDS):
        stream, _ = opened(place.folder, spec, f"data.workers={workers}")
        with closing(stream) as batches:
            next(batches)
            for path in place.folder.glob("*.tar"):
                harm(path)
            with pytest.raises(DataError, match=r"train-00000\d\.tar: .*restore the shard"):
                for _ in islice(batches, 40):
                    pass


@pytest.fixture
def nobody():
    """A folder that is not the superuser's, and the right of no superuser."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_unreadable_files_and_folders_are_named(nobody, packed, spec, monkeypatch, capsys):
    good_source(nobody / "source")
    shutil.copytree(packed, nobody / "packed")
    shutil.copytree(packed, nobody / "other")
    (nobody / "out").mkdir()
    (nobody / "out").chmod(0o777)
    for name in ("source/images/a.jpg", "packed/train-000000.tar", "other/manifest.json"):
        (nobody / name).chmod(0)
    for folder in (nobody, nobody / "source" / "images", nobody / "packed", nobody / "other"):
        folder.chmod(0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
    shard = nobody / "packed" / "train-000000.tar"
    words = ("pack", nobody / "source", "--out", nobody / "out", "--workers", 1)
    assert command(monkeypatch, *words) == 0
    assert (
        "a\tunreadable file: Permission denied" in (nobody / "out/train/rejected.txt").read_text()
    )
    for words in (("verify", nobody / "packed"), ("index", shard), ("verify", nobody / "other")):
        assert command(monkeypatch, *words, "--workers", 1) == 4
        assert "Permission denied" in "".join(capsys.readouterr())
    for folder in ("packed", "other"):
        assert explained(partial(stream, nobody / folder, spec, set())) == 4
        assert "Permission denied" in capsys.readouterr().err


def test_a_real_run_names_damage_escapes_captions_and_ends_by_its_share(place, synthetic):
    """Above and below the allowed share, with captions that attack a console and a page."""
    attack = b"<script>alert(1)</script> \x1b[2J\x07"
    content = b"".join(sample(f"s{number}", txt=attack) for number in range(31))
    tar = place.folder / "x.tar"
    tar.write_bytes(content + sample("m", jpg=b"<html>") + END)
    assert run(["mmscale", "index", tar]).returncode == 0
    run_dir = place.folder.parent / "run"
    words = [
        *ALONE,
        write_settings(place.folder.parent),
        f"data.train={place.folder}",
        f"data.eval={synthetic.val}",
        f"run.dir={run_dir}",
        "train.duration=2 steps",
        "log.page=true",
    ]
    done = run([*words, "data.max_damaged=0.5"])
    assert done.returncode == 0, explain(done)
    assert "m: undecodable image" in done.stderr
    assert "alert(1)" in done.stderr
    assert not {"\x1b", "\x07"} & set(done.stdout + done.stderr)
    assert "<script>alert" not in (run_dir / "report.html").read_text()
    done = run([*words, f"run.dir={run_dir}-2", "data.max_damaged=0.01"])
    assert done.returncode == 4, explain(done)
    assert "m: undecodable image" in done.stderr
