"""Bytes of what lies behind a URL: `http(s)` with retries, `pipe:` by a command's output.

A connection on which bytes only trickle is a failure.
"""

import os
import signal
import ssl
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpcore
import httpx

from mmscale.errors import DataError

# Attempts in a row that may bring nothing, and the pause after the first, doubled each time.
ATTEMPTS = 6
FIRST_PAUSE = 0.25
CHUNK = 2**18
# An attempt that brings fewer bytes counts as one that brings nothing.
_LEAST = 2**13
# Attempts in a row that may bring them too slowly.
_SLOW_ATTEMPTS = 2
_OPENING = 512
_MOST_DIGITS = 20
_TIMEOUT = httpx.Timeout(20.0)
# Answers that another attempt may turn into a better one.
_PASSING = {408, 425, 429, 500, 502, 503, 504}


def is_web(where: object) -> bool:
    """Whether it is an `http(s)` address."""
    return str(where).startswith(("http://", "https://"))


def is_pipe(where: object) -> bool:
    """Whether it is a command whose output is a shard."""
    return str(where).startswith("pipe:")


def is_remote(where: object) -> bool:
    """Whether it is an address or a command, not a file."""
    return is_web(where) or is_pipe(where)


def safe_url(url: object) -> str:
    """A URL as messages name it: without passwords and signatures."""
    if not is_web(url):
        return str(url)
    parts = urlsplit(str(url))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class NotThereError(DataError):
    """The server says that there is no such file."""


class Web:
    """Reads files of web servers; may be used by several threads."""

    def __init__(self) -> None:
        self._whole_only: set[str] = set()
        self._sizes: dict[str, int] = {}

    @cached_property
    def _client(self) -> httpx.Client:
        """Made where something is read: loading certificates takes a while."""
        # As they lie on the server: a range of a compressed answer would be another one.
        headers = {"Accept-Encoding": "identity", "User-Agent": "mmscale"}
        client = httpx.Client(headers=headers, follow_redirects=True, timeout=_TIMEOUT)
        for transport in (client._transport, *client._mounts.values()):
            pool = getattr(transport, "_pool", None)
            if pool is not None:
                # httpx has no setting for it, and its own timeouts begin anew with every byte.
                pool._network_backend = ImpatientBackend(pool._network_backend)
        return client

    def has_ranges(self, url: str) -> bool:
        """False once the server has answered a request for a part with the whole file."""
        return urlsplit(url).netloc not in self._whole_only

    def opening(self, url: str) -> tuple[bytes, int | None]:
        """The first 512 bytes of a file, and its size where the server tells it.

        Raises:
            DataError: As `chunks`.
        """
        opening = b""
        try:
            for chunk in self.chunks(url, 0, _OPENING):
                opening += chunk
        except DataError:
            # A file may be shorter than that.
            if self._sizes.get(url) != len(opening):
                raise
        return opening, self._sizes.get(url)

    def chunks(
        self, url: str, start: int = 0, end: int | None = None, size: int | None = None
    ) -> Generator[bytes, None, None]:
        """Bytes of a file; after a dropped connection it goes on where that left off.

        Args:
            url: The file.
            start: First byte.
            end: Byte after the last; None: to the end of the file.
            size: What the whole file must measure.

        Raises:
            DataError: The server refuses, fails too often, or has a file of another size.
        """
        at, failures, slow = start, 0, 0
        while True:
            before = at
            try:
                with self._client.stream("GET", url, headers=_range(at, end)) as answer:
                    for chunk in self._body(url, answer, at, end, size):
                        at += len(chunk)
                        yield chunk
                    _check_complete(url, answer, at, end)
                    return
            except httpx.UnsupportedProtocol as error:
                raise DataError(
                    f"{safe_url(url)}: {error}; name an http or https server"
                ) from error
            except (
                httpx.TransportError,
                httpx.TooManyRedirects,
                _PassingError,
                SlowError,
            ) as error:
                slow = slow + 1 if isinstance(error, SlowError) else 0
                failures = 1 if at >= before + _LEAST else failures + 1
                if failures >= ATTEMPTS or slow >= _SLOW_ATTEMPTS:
                    reason = f"{error or type(error).__name__}, {slow or failures} times in a row"
                    raise DataError(
                        f"{safe_url(url)}: {reason}; mend the network or the server, then go on "
                        "from the last checkpoint"
                    ) from error
                time.sleep(FIRST_PAUSE * 2 ** (failures - 1))

    def _body(
        self, url: str, answer: httpx.Response, at: int, end: int | None, size: int | None
    ) -> Iterator[bytes]:
        """The wanted part of an answer's body, also where the server sends the whole file."""
        length = _length(answer)
        if length is not None:
            self._sizes[url] = length
        _check_status(url, answer, size)
        whole = answer.status_code == 200
        if size is not None and length is not None and length != size:
            raise _wrong_size(url, length, size)
        if whole and (at or (end is not None and end != length)):
            self._whole_only.add(urlsplit(url).netloc)
        skip = at if whole else 0
        left = None if end is None else end - at
        for chunk in answer.iter_raw():
            part = chunk[skip:]
            skip -= len(chunk) - len(part)
            part = part if left is None else part[:left]
            if part:
                yield part
            if left is not None:
                left -= len(part)
                if left == 0:
                    return

    def close(self) -> None:
        """Close every connection."""
        if "_client" in vars(self):
            self._client.close()


class _PassingError(Exception):
    """An answer that the server may not repeat."""


def _range(start: int, end: int | None) -> dict[str, str]:
    if start == 0 and end is None:
        return {}
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"}


def _check_status(url: str, answer: httpx.Response, size: int | None) -> None:
    status = f"{answer.status_code} {answer.reason_phrase}".strip()
    if answer.status_code in _PASSING:
        raise _PassingError(status)
    if answer.status_code == 416 and size is not None:
        raise _wrong_size(url, _length(answer), size)
    if answer.status_code in (404, 410):
        raise NotThereError(f"{safe_url(url)}: the server answers {status}; check the address")
    if answer.status_code not in (200, 206):
        raise DataError(
            f"{safe_url(url)}: the server answers {status}; check the address and the access to it"
        )
    if answer.status_code == 206:
        wanted = answer.request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        got = answer.headers.get("Content-Range", "").removeprefix("bytes ")
        if got.split("-")[0] != wanted.split("-")[0]:
            raise DataError(
                f"{safe_url(url)}: asked for bytes {wanted}, the server sends {got or 'others'}; "
                "serve the shards with a server that knows byte ranges"
            )


def _length(answer: httpx.Response) -> int | None:
    """Size of the whole file, where the answer tells it."""
    told = answer.headers.get("Content-Length", "") if answer.status_code == 200 else ""
    told = told or answer.headers.get("Content-Range", "").rpartition("/")[2]
    # No file is larger than 63 bits tell; Python refuses numbers of thousands of digits.
    return int(told) if told.isdecimal() and len(told) < _MOST_DIGITS else None


def _check_complete(url: str, answer: httpx.Response, at: int, end: int | None) -> None:
    length = _length(answer)
    wanted = end if end is not None else length
    if wanted is None or at >= wanted:
        return
    if length is not None and at < length:
        raise _PassingError(f"the connection ended at byte {at}")
    raise DataError(f"{safe_url(url)}: ends at byte {at}, before byte {wanted}; restore the shard")


def _wrong_size(url: str, actual: int | None, wanted: int) -> DataError:
    has = "fewer" if actual is None else f"{actual}"
    return DataError(
        f"{safe_url(url)}: {has} bytes, its manifest says {wanted}; upload the shard and its "
        "manifest again"
    )


def piped(where: str) -> Generator[bytes, None, None]:
    """What the command of a `pipe:` URL writes.

    Raises:
        DataError: The command fails.
    """
    command = where.removeprefix("pipe:")
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            shell=True,
            # What is there is handed on: a command may take its time for the rest.
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        assert process.stdout is not None, "asked for above"
        try:
            while chunk := process.stdout.read(CHUNK):
                yield chunk
            code = process.wait()
        finally:
            process.stdout.close()
            with suppress(ProcessLookupError):
                # A shell's children outlive the shell alone.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            reason = f" ({said[-1][:200]})" if said else ""
            raise DataError(f"{where}: the command ended with {code}{reason}; mend the command")


# Timeouts of HTTP libraries begin anew with every byte that arrives, so that a server which sends
# one now and then is waited for without end.

# Fewer bytes than this in so many seconds of waiting, counted from a request's first byte on.
LEAST_BYTES, SECONDS = 2**13, 10.0


class SlowError(Exception):
    """A server sends too slowly."""


class ImpatientBackend(httpcore.NetworkBackend):
    """Opens connections as another backend does, and measures what arrives on them."""

    def __init__(self, backend: httpcore.NetworkBackend):
        self._backend = backend

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        """As the other backend."""
        return _Stream(self._backend.connect_tcp(*arguments, **options))

    def connect_unix_socket(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        """As the other backend."""
        return _Stream(self._backend.connect_unix_socket(*arguments, **options))

    def sleep(self, seconds: float) -> None:
        """As the other backend."""
        self._backend.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    """A connection; only time spent in waiting for bytes counts."""

    def __init__(self, stream: httpcore.NetworkStream):
        self._stream = stream
        self._waited, self._arrived, self._has_begun = 0.0, 0, False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Bytes that have arrived.

        Raises:
            SlowError: Too few of them.
        """
        began = time.monotonic()
        content = self._stream.read(max_bytes, timeout)
        if self._has_begun:
            self._waited += time.monotonic() - began
            self._arrived += len(content)
        self._has_begun = True
        if self._waited >= SECONDS:
            if self._arrived < LEAST_BYTES:
                raise SlowError(f"only {self._arrived:,} bytes in {self._waited:.0f} seconds")
            self._waited, self._arrived = 0.0, 0
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send, a new request: its answer is measured from its first byte on."""
        self._stream.write(buffer, timeout)
        self._waited, self._arrived, self._has_begun = 0.0, 0, False

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """The same over TLS."""
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """As the connection."""
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        """Close it."""
        self._stream.close()
