"""A run's folder in a bucket, over the protocol of S3: what is there, in which order, and back."""

import re
import shutil
import time

import pytest

from mmscale.checkpoint import mirror as mirrors
from mmscale.checkpoint.mirror import Mirror, meet
from mmscale.config.load import as_yaml, load_config
from mmscale.contracts import World
from mmscale.data.buckets import Buckets
from mmscale.errors import ConfigError, DataError
from tests.bucket_server import BUCKET, breaking, running_buckets

TO = f"s3://{BUCKET}/runs/mine"
KEY = "runs/mine"


@pytest.fixture(scope="module")
def running():
    with running_buckets() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    use(running.environment(), monkeypatch)
    for key in running.keys(""):
        running.client.delete_object(Bucket=BUCKET, Key=key)
    monkeypatch.setattr(mirrors, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(mirrors, "_AGAIN_SECONDS", 0.1)
    return running


@pytest.fixture
def asked(monkeypatch):
    """What the bucket is asked to do, in its order."""
    done = []

    def noting(what, method):
        def note(self, url, *arguments):
            done.append((what, url.removeprefix(f"{TO}/")))
            return method(self, url, *arguments)

        return note

    for what in ("put", "delete"):
        monkeypatch.setattr(Buckets, what, noting(what, getattr(Buckets, what)))
    return done


def use(environment, monkeypatch):
    from mmscale.data import buckets

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    buckets._process.end()


def configured(folder, *words):
    return load_config(["demo", f"run.dir={folder}", f"run.sync={TO}", *words])


def write_checkpoint(folder, step, content="weights"):
    """What looks like one: only its seal counts here."""
    aside = folder / f"checkpoints/step-{step:08d}.partial"
    (aside / "towers").mkdir(parents=True)
    (aside / "rank-00000-of-00001.safetensors").write_text(f"{content} {step}")
    (aside / "towers/vision.json").write_text("{}")
    (aside / "state.json").write_text(f"state {step}")
    (aside / "state.sha256").write_text(f"digest of {content} {step}")
    aside.rename(aside.with_suffix(""))


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(as_yaml(configured(folder).model_dump(mode="json")))
    (folder / "metrics.jsonl").write_text("a line\n")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard/events.1.host").write_text("events")
    for name in ("run.lock", ".aside.part", "features.safetensors"):
        (folder / name).write_text("nobody's")
    write_checkpoint(folder, 10)
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.lock", ".aside.part", "features.safetensors")
    }


def in_bucket(server):
    get = server.client.get_object
    return {
        key.removeprefix(f"{KEY}/"): get(Bucket=BUCKET, Key=key)["Body"].read()
        for key in server.keys(f"{KEY}/")
    }


def copied(folder, tell=print):
    config = configured(folder)
    meet(config, World(), tell)
    with Mirror(config.run, World()) as mirror:
        mirror.start(tell)


def until(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_mirror_is_the_folder_and_a_checkpoint_looks_whole_last(server, run_dir, asked):
    copied(run_dir)
    assert in_bucket(server) == contents(run_dir)
    assert asked[-1] == ("put", "checkpoints/step-00000010/state.sha256")
    assert len(asked) == 7


def test_new_checkpoints_are_copied_and_old_ones_lose_their_seal_first(server, run_dir, asked):
    config = configured(run_dir)
    with Mirror(config.run, World()) as mirror:
        mirror.start(print)
        until(lambda: f"{KEY}/checkpoints/step-00000010/state.sha256" in server.keys(KEY))
        (run_dir / "checkpoints/step-00000020.partial").mkdir()
        (run_dir / "checkpoints/step-00000020.partial/half").write_text("not whole")
        time.sleep(0.2)
        (run_dir / "checkpoints/step-00000020.partial/half").unlink()
        (run_dir / "checkpoints/step-00000020.partial").rmdir()
        write_checkpoint(run_dir, 20)
        until(lambda: f"{KEY}/checkpoints/step-00000020/state.sha256" in server.keys(KEY))
        for path in sorted((run_dir / "checkpoints/step-00000010").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (run_dir / "checkpoints/step-00000010").rmdir()
    assert in_bucket(server) == contents(run_dir)
    gone = [name for do, name in asked if do == "delete"]
    assert gone[0] == "checkpoints/step-00000010/state.sha256"
    assert len(gone) == 4
    assert not any("half" in name for _, name in asked)


def test_a_checkpoint_written_anew_is_none_while_it_is_replaced(server, run_dir, asked):
    copied(run_dir)
    for path in (run_dir / "checkpoints/step-00000010").iterdir():
        if path.is_file():
            path.write_text(f"{path.read_text()} of another world")
    asked.clear()
    with Mirror(configured(run_dir).run, World()) as mirror:
        mirror.start(print)
    assert asked[0] == ("delete", "checkpoints/step-00000010/state.sha256")
    assert asked[-1] == ("put", "checkpoints/step-00000010/state.sha256")
    assert in_bucket(server) == contents(run_dir)


def test_a_bucket_that_is_gone_is_told_once_and_copied_to_when_it_is_back(
    server, run_dir, monkeypatch
):
    lines = []
    with breaking(server.endpoint, after=0, cuts=10**9) as way:
        use(server.environment(way.endpoint), monkeypatch)
        with Mirror(configured(run_dir).run, World()) as mirror:
            mirror.start(lines.append)
            until(lambda: lines)
            time.sleep(0.5)
            way.cuts = 0
            until(lambda: len(lines) == 2, 30)
    assert "the run goes on, and copying is tried again" in lines[0]
    assert lines[1] == f"run.sync={TO}: everything is copied again"
    assert in_bucket(server) == contents(run_dir)


def test_what_was_not_copied_at_the_end_is_told_in_bounded_time(server, run_dir, monkeypatch):
    lines = []
    monkeypatch.setattr(mirrors, "_TRYING_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    use({}, monkeypatch)
    began = time.monotonic()
    with Mirror(configured(run_dir).run, World()) as mirror:
        mirror.start(lines.append)
    assert time.monotonic() - began < 15
    # Config, log, events, and the four of the checkpoint.
    assert re.search(rf"run.sync={TO}: 7 files were not copied, such as checkpoints/", lines[-1])
    with pytest.raises(DataError, match=rf"^{TO}: .*mend the network"):
        meet(configured(run_dir), World(), print)


def test_an_empty_folder_takes_the_run_and_nothing_that_is_not_whole(server, run_dir, tmp_path):
    write_checkpoint(run_dir, 20)
    copied(run_dir)
    wanted = contents(run_dir)
    for name in ("checkpoints/step-00000030/rank-00000-of-00001.safetensors", ".hidden"):
        server.client.put_object(Bucket=BUCKET, Key=f"{KEY}/{name}", Body=b"half")
    lines, other = [], tmp_path / "elsewhere"
    (other / "checkpoints.fetched/step-00000099").mkdir(parents=True)
    meet(configured(other), World(), lines.append)
    assert contents(other) == wanted
    assert lines == [f"run.sync={TO}: fetching the run, which is at step-00000020"]
    # And what was left of the third goes when the run copies again.
    copied(other)
    assert not any("step-00000030" in key for key in server.keys(KEY))


REFUSALS = {
    "a later state": ((), r"holds step-00000030, which run.dir=.* does not have: the run has"),
    "another state of the same step": ((), r"holds step-00000010, which run.dir"),
    "another run": (("run.seed=7",), r"holds another run \(run.seed=0 there, 7 here\); set an"),
    "never": (("run.resume=never",), r"run.resume=never, but run.sync=.* holds a run; set"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_run_that_the_folder_lacks_is_never_written_over(server, run_dir, case):
    words, told = REFUSALS[case]
    if case == "a later state":
        write_checkpoint(run_dir, 30)
    copied(run_dir)
    before = in_bucket(server)
    if case == "a later state":
        (run_dir / "checkpoints/step-00000030").rename(run_dir.parent / "aside")
    if case.startswith("another state"):
        (run_dir / "checkpoints/step-00000010/state.sha256").write_text("of another world")
    with pytest.raises(ConfigError, match=told):
        meet(configured(run_dir, *words), World(), print)
    assert in_bucket(server) == before


def test_a_run_to_overwrite_goes_from_the_bucket_too(server, run_dir):
    copied(run_dir)
    meet(configured(run_dir, "run.resume=never", "run.overwrite=true"), World(), print)
    assert list(in_bucket(server)) == ["tensorboard/events.1.host"]


def test_a_folder_that_is_removed_under_a_run_takes_nothing_from_the_bucket(server, run_dir):
    copied(run_dir)
    before = in_bucket(server)
    with Mirror(configured(run_dir).run, World()) as mirror:
        shutil.rmtree(run_dir)
        mirror.start(print)
    assert in_bucket(server) == before


@pytest.mark.parametrize("value", ["runs/x", "https://host/x", "s3://", "hf://datasets/a/b"])
def test_an_address_that_is_no_folder_of_a_bucket_is_refused(value):
    with pytest.raises(ConfigError, match=r"run.sync.*is no folder of a bucket; write s3://"):
        load_config(["demo", f"run.sync={value}"])
