"""Bytes of what lies elsewhere: one interface for stores of files, and web servers behind it.

`pipe:` is a command's output.
"""

import os
import re
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx

from mmscale.data.impatient import ImpatientBackend, SlowError
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
_TAR_NAME = re.compile(r"[^\s/'\"=:]+\.tar")
# Stands for the file name in a command; a command cannot hold it.
_MARK = "\0"
BUCKETS, HUB = ("s3://", "gs://", "az://"), "hf://"


def is_web(where: object) -> bool:
    """Whether it is an `http(s)` address."""
    return str(where).startswith(("http://", "https://"))


def is_listed(where: object) -> bool:
    """Whether it is an address in a store that tells the names of its files."""
    return str(where).startswith((*BUCKETS, HUB))


def is_address(where: object) -> bool:
    """Whether it is an address of a file, or of a folder."""
    return is_web(where) or is_listed(where)


def is_pipe(where: object) -> bool:
    """Whether it is a command whose output is a shard."""
    return str(where).startswith("pipe:")


def is_remote(where: object) -> bool:
    """Whether it is an address or a command, not a file."""
    return is_address(where) or is_pipe(where)


def safe_url(url: object) -> str:
    """A URL as messages name it: without passwords and signatures."""
    if is_listed(url):
        scheme, _, rest = str(url).partition("://")
        place, slash, path = rest.partition("/")
        return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"
    if not is_web(url):
        return str(url)
    parts = urlsplit(str(url))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def beside(folder: Path | str, name: str) -> Path | str:
    """The place of a file in a folder, a URL's folder, or a command's with a mark in it."""
    if isinstance(folder, Path):
        return folder / name
    if is_pipe(folder):
        return folder.replace(_MARK, name)
    if is_listed(folder):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def split_place(path: Path | str) -> tuple[Path | str, str]:
    """Folder and file name of a shard."""
    if isinstance(path, Path):
        return path.parent, path.name
    if is_pipe(path):
        # The command itself, a mark in the place of the file name.
        names = list(_TAR_NAME.finditer(path))
        if not names:
            raise DataError(
                f"{path}: names no .tar, so nothing tells where its manifest is; set "
                "data.resampled=true"
            )
        start, end = names[-1].span()
        return f"{path[:start]}{_MARK}{path[end:]}", names[-1][0]
    if is_listed(path):
        folder, _, name = path.rpartition("/")
        return folder, name
    parts = urlsplit(path)
    folder, _, name = parts.path.rpartition("/")
    return urlunsplit((parts.scheme, parts.netloc, folder, parts.query, "")), unquote(name)


@dataclass(frozen=True)
class Entries:
    """What a folder holds: sizes of its files by their names, and names of the folders in it."""

    files: dict[str, int]
    folders: list[str]


class NotThereError(DataError):
    """The server says that there is no such file."""


class PassingError(Exception):
    """A failure that another attempt may not meet."""


class Store(ABC):
    """Files that lie elsewhere: their sizes, their bytes from one place to another, their names.

    May be used by several threads. What is tried again, and how reading goes on after a dropped
    connection, is the same for all; a subclass makes one attempt.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def has_ranges(self, url: str) -> bool:
        """False once it has answered a request for a part with the whole file."""
        return True

    def opening(self, url: str) -> tuple[bytes, int | None]:
        """The first 512 bytes of a file, and its size where that is told.

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
            DataError: The store refuses, fails too often, or has a file of another size.
        """
        at, failures, slow = start, 0, 0
        while True:
            before = at
            try:
                with closing(self._attempt(url, at, end, size)) as chunks:
                    for chunk in chunks:
                        at += len(chunk)
                        yield chunk
                    return
            except (PassingError, SlowError) as error:
                slow = slow + 1 if isinstance(error, SlowError) else 0
                failures = 1 if at >= before + _LEAST else failures + 1
                if failures >= ATTEMPTS or slow >= _SLOW_ATTEMPTS:
                    reason = f"{error or type(error).__name__}, {slow or failures} times in a row"
                    raise DataError(
                        f"{safe_url(url)}: {reason}; mend the network or the server, then go on "
                        "from the last checkpoint"
                    ) from error
                time.sleep(FIRST_PAUSE * 2 ** (failures - 1))

    @abstractmethod
    def _attempt(
        self, url: str, at: int, end: int | None, size: int | None
    ) -> Generator[bytes, None, None]:
        """Bytes of a file, as `chunks` but over one connection; notes the file's size.

        Raises:
            PassingError: It failed, and may not the next time.
            SlowError: Bytes only trickle.
            DataError: Another attempt would fail too.
        """

    def entries(self, folder: str) -> Entries:
        """What a folder holds.

        Raises:
            DataError: The store does not tell, or refuses.
        """
        raise DataError(
            f"{safe_url(folder)}: a web server gives no list of its files; name them in braces, "
            "such as train-{000000..000028}.tar"
        )

    def put(self, url: str, content: bytes | Path) -> None:
        """Write a file, which appears whole or not at all.

        Raises:
            DataError: The store takes none, or fails.
        """
        raise DataError(f"{safe_url(url)}: cannot be written")

    @abstractmethod
    def close(self) -> None:
        """Close every connection."""

    def _check_complete(self, url: str, at: int, end: int | None) -> None:
        length = self._sizes.get(url)
        wanted = end if end is not None else length
        if wanted is None or at >= wanted:
            return
        if length is not None and at < length:
            raise PassingError(f"the connection ended at byte {at}")
        raise DataError(
            f"{safe_url(url)}: ends at byte {at}, before byte {wanted}; restore the shard"
        )


class Web(Store):
    """Reads files of web servers."""

    def __init__(self) -> None:
        super().__init__()
        self._whole_only: set[str] = set()

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

    def _attempt(
        self, url: str, at: int, end: int | None, size: int | None
    ) -> Generator[bytes, None, None]:
        try:
            address, headers = self._target(url)
            headers |= _range(at, end)
            with self._client.stream("GET", address, headers=headers) as answer:
                for chunk in self._body(url, answer, at, end, size):
                    at += len(chunk)
                    yield chunk
                self._check_complete(url, at, end)
        except httpx.UnsupportedProtocol as error:
            raise DataError(f"{safe_url(url)}: {error}; name an http or https server") from error
        except (httpx.TransportError, httpx.TooManyRedirects) as error:
            raise PassingError(str(error) or type(error).__name__) from error

    def _target(self, url: str) -> tuple[str, dict[str, str]]:
        """What is asked for, and headers that its server wants."""
        return url, {}

    def _refusal(self, url: str, answer: httpx.Response) -> DataError:
        """What an answer says that is no file and stays so."""
        status = f"{answer.status_code} {answer.reason_phrase}".strip()
        if answer.status_code in (404, 410):
            return NotThereError(f"{safe_url(url)}: the server answers {status}; check the address")
        return DataError(
            f"{safe_url(url)}: the server answers {status}; check the address and the access to it"
        )

    def _check_status(self, url: str, answer: httpx.Response, size: int | None) -> None:
        if answer.status_code in _PASSING:
            raise PassingError(f"{answer.status_code} {answer.reason_phrase}".strip())
        if answer.status_code == 416 and size is not None:
            raise wrong_size(url, _length(answer), size)
        if answer.status_code not in (200, 206):
            raise self._refusal(url, answer)
        if answer.status_code == 206:
            wanted = answer.request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
            got = answer.headers.get("Content-Range", "").removeprefix("bytes ")
            if got.split("-")[0] != wanted.split("-")[0]:
                raise DataError(
                    f"{safe_url(url)}: asked for bytes {wanted}, the server sends "
                    f"{got or 'others'}; serve the shards with a server that knows byte ranges"
                )

    def _body(
        self, url: str, answer: httpx.Response, at: int, end: int | None, size: int | None
    ) -> Iterator[bytes]:
        """The wanted part of an answer's body, also where the server sends the whole file."""
        length = _length(answer)
        if length is not None:
            self._sizes[url] = length
        self._check_status(url, answer, size)
        whole = answer.status_code == 200
        if size is not None and length is not None and length != size:
            raise wrong_size(url, length, size)
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


def _range(start: int, end: int | None) -> dict[str, str]:
    if start == 0 and end is None:
        return {}
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"}


def _length(answer: httpx.Response) -> int | None:
    """Size of the whole file, where the answer tells it."""
    told = answer.headers.get("Content-Length", "") if answer.status_code == 200 else ""
    told = told or answer.headers.get("Content-Range", "").rpartition("/")[2]
    # No file is larger than 63 bits tell; Python refuses numbers of thousands of digits.
    return int(told) if told.isdecimal() and len(told) < _MOST_DIGITS else None


def wrong_size(url: str, actual: int | None, wanted: int) -> DataError:
    """For a file that is not as long as its manifest says."""
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
