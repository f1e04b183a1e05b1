"""One run folder, one run: rank 0 holds `run.lock` from its start to its end.

A lock of the operating system tells for sure where it works: on one machine, and over a network
whose file system passes it on. Where it does not, the holder's beats do: it writes the file anew
every few seconds, and who finds another machine's name in it watches whether it still does.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from mmscale.contracts import World
from mmscale.errors import ConfigError
from mmscale.parallel.peers import broadcast_object

LOCK = "run.lock"
BEAT_SECONDS = 10.0
# A lock whose holder cannot be asked is dead when it has not beaten for so long.
STALE_SECONDS = 45.0
_POLL_SECONDS = 0.5
_LENGTH = 512
_TAKEN, _WATCHING = "taken", "watching"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder.

    Attributes:
        host: Name of the machine.
        pid: Process there.
        boot: Of the machine's system: two machines of one name have two.
    """

    host: str
    pid: int
    boot: str

    @classmethod
    def this_process(cls) -> "Holder":
        """The holder that this process is."""
        try:
            boot = _BOOT_ID.read_text("ascii").strip()
        except OSError:
            boot = ""
        return cls(socket.gethostname(), os.getpid(), boot)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """The claim of a run on its folder; released when its block is left, however the run ends.

    Args:
        run_dir: The run's folder.
        stale: Seconds without a beat after which another machine's lock is taken over.
        beat: Seconds between two beats.
    """

    def __init__(self, run_dir: Path, stale: float = STALE_SECONDS, beat: float = BEAT_SECONDS):
        self._run_dir, self._path = run_dir, run_dir / LOCK
        self._stale, self._beat = stale, beat
        self._handle: int | None = None
        self._beat_number = 0
        self._released = threading.Event()
        self._beats: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def take(self, world: World, tell: Callable[[str], None]) -> None:
        """Claim the folder, which is made if it is missing. Collective.

        Args:
            world: The ranks; rank 0 holds the lock for all of them.
            tell: Takes a line where it must be seen first whether another machine's run lives.

        Raises:
            ConfigError: Another run is in the folder, or it cannot be written to; on every rank.
        """
        claim = self._claim(tell)
        # Told again and again while rank 0 watches, so that nobody waits for longer than a moment.
        while (
            answer := broadcast_object(world, next(claim) if world.is_main else None)
        ) == _WATCHING:
            continue
        if answer != _TAKEN:
            raise ConfigError(answer)

    def _claim(self, tell: Callable[[str], None]) -> Iterator[str]:
        """`_WATCHING` as long as that takes, then `_TAKEN` or why the folder cannot be taken."""
        if self._handle is not None:
            yield _TAKEN
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            locks = self._lock()
            holder = self._holder()
            if locks is not False and self._may_live(holder, locks):
                tell(
                    f"run.dir={self._run_dir}: {holder} was here and may still be; "
                    f"watching for {self._stale:g} s whether it goes on"
                )
                seen, deadline = self._content(), time.monotonic() + self._stale
                while self._content() == seen and time.monotonic() < deadline:
                    yield _WATCHING
                    time.sleep(_POLL_SECONDS)
                # To look is to give the lock away.
                locks = self._lock() if self._content() == seen else False
            if locks is False:
                yield self._refusal(holder)
                return
            self._write()
        except OSError as error:
            self._close()
            yield f"run.dir={self._run_dir}: cannot be written to ({error.strerror}); set another"
            return
        self._beats = threading.Thread(target=self._go_on_beating, daemon=True)
        self._beats.start()
        yield _TAKEN

    def _lock(self) -> bool | None:
        """Whether the system's lock is ours; None where the file system knows none."""
        if self._handle is None:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Of the process, not of the open file: decoding workers that outlive a killed run by
            # seconds do not hold it.
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return None
        return True

    def _may_live(self, holder: Holder | None, locks: bool | None) -> bool:
        """Whether a holder may be alive although its lock was not in the way."""
        if holder is None:
            return False
        me = Holder.this_process()
        same = holder.boot == me.boot if me.boot else holder.host == me.host
        # One system sees its own locks: had it lived, ours would have been refused.
        return not (same and locks)

    def _refusal(self, holder: Holder | None) -> str:
        self._close()
        return (
            f"run.dir={self._run_dir}: another run is in this folder "
            f"({holder or 'which does not say where'}); wait for its end, or set another run.dir"
        )

    def _holder(self) -> Holder | None:
        """Who the file names; None where nobody does, or nothing that can be read."""
        assert self._handle is not None
        try:
            found = json.loads(os.pread(self._handle, _LENGTH, 0))
            return Holder(str(found["host"]), int(found["pid"]), str(found["boot"]))
        except (ValueError, LookupError, TypeError):
            return None

    def _content(self) -> bytes:
        """What the file holds now; opened anew, since a network's cache is then asked anew.

        Closing any handle gives the system's lock away.
        """
        return self._path.read_bytes()[:_LENGTH]

    def _write(self) -> None:
        assert self._handle is not None
        self._beat_number += 1
        beat = {**asdict(Holder.this_process()), "beat": self._beat_number}
        os.pwrite(self._handle, json.dumps(beat).encode().ljust(_LENGTH), 0)
        os.truncate(self._handle, _LENGTH)
        os.fsync(self._handle)

    def _go_on_beating(self) -> None:
        while not self._released.wait(self._beat):
            # On a full disk the system's lock still holds.
            with suppress(OSError):
                self._write()

    def _release(self) -> None:
        if self._handle is None:
            return
        self._released.set()
        if self._beats is not None:
            self._beats.join()
            with suppress(OSError):
                os.truncate(self._handle, 0)
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
