"""Files in buckets (`s3://`, `gs://`, `az://`), read and filled by a process that runs obstore."""

import atexit
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmscale.data import bucket_process
from mmscale.data.bucket_process import FRAME
from mmscale.data.impatient import SlowError
from mmscale.data.remote import Entries, NotThereError, PassingError, Store, safe_url, wrong_size
from mmscale.errors import ConfigError, DataError

# So long nothing may come on a line.
_SILENCE_SECONDS = 25.0


class _Process:
    """The process beside this one, started when it is first needed; one for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def line(self) -> socket.socket:
        """A new line to it."""
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self._start()
            assert self._control is not None, "started above"
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._control, [b"l"], [theirs.fileno()])
            ours.settimeout(_SILENCE_SECONDS)
            return ours

    def _start(self) -> None:
        self.end()
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", bucket_process.__file__, str(theirs.fileno())]
            # A session of its own: a signal to this process's group is this process's affair.
            self._running = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def end(self) -> None:
        """End it, and wait for that."""
        if self._control is not None:
            self._control.close()
        if self._running is not None:
            self._running.wait()
        self._running = self._control = None

    def forget(self) -> None:
        """In a process that is forked: it is the parent's."""
        if self._control is not None:
            self._control.close()
        self.__init__()  # type: ignore[misc]


_process = _Process()
os.register_at_fork(after_in_child=_process.forget)
atexit.register(_process.end)


def require_extra(what: str) -> None:
    """Refuse an address that only obstore reads where it is not installed.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("obstore") is None:
        raise ConfigError(
            f"{safe_url(what)}: is read with obstore, which is not installed; run "
            "pip install 'mmscale[cloud]'"
        )


class Buckets(Store):
    """Reads and fills buckets."""

    def __init__(self) -> None:
        super().__init__()
        self._idle: list[tuple[int, socket.socket]] = []

    def _attempt(
        self, url: str, at: int, end: int | None, size: int | None
    ) -> Generator[bytes, None, None]:
        answer = self._ask({"do": "get", "url": url, "start": at, "end": end}, size)
        try:
            self._sizes[url] = length = next(answer)["size"]
            if size is not None and length != size:
                raise wrong_size(url, length, size)
            for chunk in answer:
                at += len(chunk)
                yield chunk
        finally:
            answer.close()
        self._check_complete(url, at, end)

    def entries(self, folder: str) -> Entries:
        """As of any store."""
        (found,) = self._done({"do": "list", "url": folder})
        return Entries(**found)

    def walk(self, folder: str) -> dict[str, int]:
        """Sizes of all files in a folder and the folders in it, by their names from there.

        Raises:
            DataError: The store refuses, or fails.
        """
        found = self._done({"do": "walk", "url": folder})
        return {name: size for part in found for name, size in part["files"].items()}

    def put(self, url: str, content: bytes | Path) -> None:
        """As of any store."""
        what = {"file": str(content)} if isinstance(content, Path) else {"text": content.decode()}
        self._done({"do": "put", "url": url, **what})

    def delete(self, url: str) -> None:
        """Remove a file, if it is there.

        Raises:
            DataError: The store refuses, or fails.
        """
        self._done({"do": "delete", "url": url})

    def _done(self, request: dict[str, Any]) -> list[Any]:
        """The answer, after which a request is done."""
        try:
            return [frame for frame in self._ask(request) if frame]
        except (PassingError, SlowError) as error:
            where = safe_url(request["url"])
            raise DataError(f"{where}: {error}; mend the network and try again") from error

    def _ask(self, request: dict[str, Any], size: int | None = None) -> Generator[Any, None, None]:
        """The frames of an answer: objects and bytes."""
        require_extra(request["url"])
        line, is_done = self._line(), False
        try:
            line.sendall(json.dumps(request).encode() + b"\n")
            while True:
                letter, content = _frame(line)
                if letter == b"e":
                    is_done = True
                    raise _told(request["url"], size, **json.loads(content))
                if letter == b".":
                    is_done = True
                    return
                yield content if letter == b"d" else json.loads(content)
        except TimeoutError as error:
            raise SlowError(f"nothing came for {_SILENCE_SECONDS:.0f} seconds") from error
        except OSError as error:
            raise PassingError("the process that reads buckets ended") from error
        finally:
            if is_done:
                self._idle.append((os.getpid(), line))
            else:
                # What is still to come on it belongs to nobody.
                line.close()

    def _line(self) -> socket.socket:
        with suppress(IndexError):
            while True:
                owner, line = self._idle.pop()
                if owner == os.getpid():
                    return line
        return _process.line()

    def close(self) -> None:
        """Close every line."""
        with suppress(IndexError):
            while True:
                self._idle.pop()[1].close()


def _frame(line: socket.socket) -> tuple[bytes, bytes]:
    letter, length = FRAME.unpack(_exactly(line, FRAME.size))
    return letter, _exactly(line, length)


def _exactly(line: socket.socket, count: int) -> bytes:
    content = bytearray(count)
    view, at = memoryview(content), 0
    while at < count:
        got = line.recv_into(view[at:])
        if not got:
            raise ConnectionResetError("the line was closed")
        at += got
    return bytes(content)


def _told(url: str, size: int | None, kind: str, why: str) -> Exception:
    """A failure of the store, as the one of our own that it is."""
    if kind == "passing":
        return PassingError(why)
    if kind == "missing":
        return NotThereError(f"{safe_url(url)}: {why}")
    if kind == "size" and size is not None:
        return wrong_size(url, None, size)
    return DataError(f"{safe_url(url)}: {why}")
