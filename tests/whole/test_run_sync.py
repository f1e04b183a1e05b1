"""A run that is mirrored to a bucket while it trains, and goes on from there on another machine."""

import os
import signal
import time

import pytest

from mmscale.checkpoint.files import Checkpoint, step_folders
from tests.bucket_server import breaking, running_buckets
from tests.whole.command import end, explain, run, start
from tests.whole.processes import launched
from tests.whole.small_run import (
    ALONE,
    course,
    metrics,
    succeed,
    torchrun,
    words_for,
    write_settings,
)


@pytest.fixture(scope="module")
def server():
    with running_buckets() as running:
        yield running


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory):
    words = words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))
    return [*words, "train.duration=80 steps", "checkpoint.every=10 steps", "checkpoint.keep=2"]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    succeed([*ALONE, *settings, f"run.dir={folder}"])
    return folder


def digests(run_dir):
    """Of everything in the last checkpoint but when and where."""
    checkpoint = Checkpoint(step_folders(run_dir)[0])
    return {n: checkpoint.read("value", n).numpy().tobytes() for n in checkpoint.tensors}


@pytest.mark.slow
@pytest.mark.parametrize("launch", [lambda: ALONE, torchrun], ids=["alone", "two ranks"])
def test_a_killed_run_goes_on_elsewhere_bit_for_bit(server, settings, tmp_path, straight, launch):
    under = "alone" if launch() == ALONE else "ranks"
    to = f"s3://pairs/{under}"
    words = [*launch(), *settings, f"run.sync={to}"]
    if launch() != ALONE:
        straight = tmp_path / "straight"
        succeed([*launch(), *settings, f"run.dir={straight}"])
    with launched([*words, f"run.dir={tmp_path / 'first'}"], server.environment()) as first:
        deadline = time.monotonic() + 90
        while not any(key.endswith("state.sha256") for key in server.keys(under)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # A machine that is lost: every rank and whatever it started.
        for pid in first.running():
            os.kill(pid, signal.SIGKILL)
        assert not (tmp_path / "first/checkpoints/step-00000080").exists()
    done = succeed([*words, f"run.dir={tmp_path / 'second'}"], env=server.environment())
    assert "fetching the run, which is at step-00000" in done.stderr, explain(done)
    assert course(tmp_path / "second") == course(straight)
    assert digests(tmp_path / "second") == digests(straight)
    assert metrics(tmp_path / "second")[-1]["finished"]
    # What is in the bucket at the end is what is in the folder.
    names = [key.partition("/")[2] for key in server.keys(f"{under}/")]
    second = tmp_path / "second"
    here = [p.relative_to(second).as_posix() for p in second.rglob("*") if p.is_file()]
    assert sorted(names) == sorted(name for name in here if name != "run.lock")
    third = succeed([*words, f"run.dir={tmp_path / 'third'}"], env=server.environment())
    assert "which is at step-00000080" in third.stderr
    assert course(tmp_path / "third") == course(straight)


@pytest.mark.slow
def test_a_bucket_that_goes_away_costs_the_run_nothing_but_the_copy(
    server, settings, tmp_path, straight
):
    """The server answers until the run has begun; then nobody does."""
    with breaking(server.endpoint, after=10**9, cuts=0) as way:
        words = [*ALONE, *settings, "run.sync=s3://pairs/gone", f"run.dir={tmp_path / 'run'}"]
        process = start(words, env=server.environment(way.endpoint))
        try:
            while not (tmp_path / "run/metrics.jsonl").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            way.after, way.cuts = 0, 10**9
            _, stderr = process.communicate(timeout=120)
        finally:
            end(process)
    assert process.returncode == 0, stderr
    assert course(tmp_path / "run") == course(straight)
    assert "the run goes on, and copying is tried again" in stderr
    assert "files were not copied" in stderr


@pytest.mark.slow
def test_a_bucket_that_is_shut_ends_a_run_before_it_begins(server, settings, tmp_path):
    environment = server.environment() | {"AWS_SECRET_ACCESS_KEY": "guess-it"}
    words = [*ALONE, *settings, "run.sync=s3://pairs/shut", f"run.dir={tmp_path / 'run'}"]
    with server.locked():
        done = run(words, env=environment)
    assert done.returncode == 4, explain(done)
    told = [line for line in done.stderr.splitlines() if line.startswith("mmscale: ")]
    assert len(told) == 1, explain(done)
    assert "the credentials are not accepted (403" in told[0]
    assert "guess-it" not in done.stderr
