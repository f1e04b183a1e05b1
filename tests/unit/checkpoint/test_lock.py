"""One run a folder: real processes that hold it, die in it, or live where no lock can tell."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from mmscale.checkpoint.lock import LOCK, RunLock
from mmscale.contracts import World
from mmscale.errors import ConfigError

ALONE = World()
FORK = multiprocessing.get_context("fork")


def _hold(run_dir, ready, with_worker):
    """Take the folder and stay; with a process of its own that stays longer."""
    with RunLock(run_dir) as lock:
        lock.take(ALONE, print)
        worker = os.fork() if with_worker else None
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        ready.send(worker)
        ready.recv()


@pytest.fixture
def holding(tmp_path):
    """Starts processes that hold `tmp_path`; ends them all."""
    started, workers = [], []

    def start(with_worker=False):
        here, there = FORK.Pipe()
        process = FORK.Process(target=_hold, args=(tmp_path, there, with_worker))
        process.start()
        started.append(process)
        workers.append(here.recv())
        return process, here

    yield start
    for process in started:
        process.kill()
        process.join()
    for worker in filter(None, workers):
        os.kill(worker, signal.SIGKILL)


def _take(run_dir, **times):
    """Take the folder and give it back; what was told, and how long that took."""
    told, began = [], time.monotonic()
    with RunLock(run_dir, **times) as lock:
        lock.take(ALONE, told.append)
        assert json.loads((run_dir / LOCK).read_text())["pid"] == os.getpid()
    return told, time.monotonic() - began


def test_a_folder_with_a_run_in_it_is_refused_naming_who_is_there(holding, tmp_path):
    process, end = holding()
    for _ in range(2):
        with pytest.raises(ConfigError) as refused:
            _take(tmp_path)
        assert f"process {process.pid} on {socket.gethostname()}" in str(refused.value)
    end.send("end")
    process.join()
    assert _take(tmp_path)[0] == [], "a run that has ended is told of by nothing"


def test_a_killed_runs_folder_is_free_at_once_although_its_workers_live(holding, tmp_path):
    process, _ = holding(with_worker=True)
    with pytest.raises(ConfigError):
        _take(tmp_path)
    process.kill()
    process.join()
    told, seconds = _take(tmp_path, stale=60.0)
    assert told == []
    assert seconds < 30


def _other_machine(run_dir, beats, stop=None):
    """What a run on another machine writes, whose lock is not seen here."""
    # Written over, as a run's beats are: who reads between two beats finds one of them whole.
    with (run_dir / LOCK).open("wb", buffering=0) as lock:
        for number in range(beats):
            there = {"host": "far-away", "pid": 77, "boot": "another", "beat": number}
            os.pwrite(lock.fileno(), json.dumps(there).encode().ljust(512), 0)
            if stop is None or stop.wait(0.2):
                return


def test_another_machines_run_is_refused_while_it_beats(tmp_path):
    stop = threading.Event()
    beats = threading.Thread(target=_other_machine, args=(tmp_path, 10**6, stop))
    beats.start()
    told = []
    try:
        while not (tmp_path / LOCK).exists() or not (tmp_path / LOCK).read_bytes():
            time.sleep(0.01)
        with RunLock(tmp_path, stale=60.0) as lock:
            with pytest.raises(ConfigError, match="process 77 on far-away"):
                lock.take(ALONE, told.append)
            with pytest.raises(ConfigError, match="process 77 on far-away"):
                lock.take(ALONE, told.append)
    finally:
        stop.set()
        beats.join()
    assert "watching for 60 s" in told[0]


def test_another_machines_dead_lock_is_taken_over_after_a_stated_time(tmp_path):
    _other_machine(tmp_path, 1)
    told, seconds = _take(tmp_path, stale=1.5)
    assert seconds >= 1.5
    assert "process 77 on far-away was here and may still be; watching for 1.5 s" in told[0]


def test_a_run_beats_so_that_others_can_see_it(tmp_path):
    with RunLock(tmp_path, beat=0.05) as lock:
        lock.take(ALONE, print)
        seen = (tmp_path / LOCK).read_bytes()
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK).read_bytes() == seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that knows no locks."""

    def refuse(handle, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_where_no_lock_can_be_had_the_beats_tell(no_locks, tmp_path):
    with RunLock(tmp_path, beat=0.1) as first:
        first.take(ALONE, print)
        with RunLock(tmp_path, stale=60.0) as second, pytest.raises(ConfigError):
            # Two in one process are one holder: only its beat number moves.
            second.take(ALONE, print)
    assert _take(tmp_path, stale=60.0)[0] == []


def test_what_is_in_the_lock_is_data(tmp_path):
    for content in (b"", b"{", b"[1]", b"\xff" * 99, b'{"host": 1}', b"9" * 100_000):
        (tmp_path / LOCK).write_bytes(content)
        assert _take(tmp_path)[0] == []


def test_a_folder_that_cannot_be_had_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with RunLock(tmp_path / "file") as lock, pytest.raises(ConfigError, match="cannot be written"):
        lock.take(ALONE, print)
    (tmp_path / LOCK).mkdir()
    with RunLock(tmp_path) as lock, pytest.raises(ConfigError, match="cannot be written"):
        lock.take(ALONE, print)
