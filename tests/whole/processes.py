"""The processes of a launch that a test strikes, found as an operator would: in /proc."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from uuid import uuid4

from tests.whole.command import end, start

_MARK = "MMSCALE_TEST_LAUNCH"


class Launch:
    """A command and everything that descends from it, whatever sessions the launchers open."""

    def __init__(self, words: list[str | Path], env: dict[str, str] | None = None):
        self._mark = uuid4().hex
        self.process: Popen[str] = start(words, env={**(env or {}), _MARK: self._mark})

    def running(self) -> list[int]:
        """Processes that have not ended."""
        return [pid for pid in _pids() if _environment(pid).get(_MARK) == self._mark]

    def rank(self, rank: int) -> int:
        """The training process of a rank: its decoding processes have it as their parent."""
        found = {p: _environment(p).get("RANK") for p in self.running()}
        return next(p for p, r in found.items() if r == str(rank) and not found.get(parent(p)))

    def children(self, pid: int) -> list[int]:
        """Processes that a process has started."""
        return [other for other in self.running() if parent(other) == pid]

    def left_after(self, seconds: float) -> list[int]:
        """Who is still running after so long; empty as soon as nobody is."""
        deadline = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@contextmanager
def launched(words: list[str | Path], env: dict[str, str] | None = None) -> Iterator[Launch]:
    """A launch that leaves nothing behind."""
    launch = Launch(words, env)
    try:
        yield launch
    finally:
        end(launch.process)
        for pid in launch.running():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int | None:
    """Who started a process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> dict[str, str]:
    """What it was started with; empty for one that has ended."""
    try:
        words = Path(f"/proc/{pid}/environ").read_text("utf-8", "replace").split("\0")
    except OSError:
        return {}
    return dict(word.partition("=")[::2] for word in words if "=" in word)
