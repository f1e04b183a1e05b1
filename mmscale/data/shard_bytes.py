"""Bytes of shards by their place: files are read where they lie, remote shards in blocks.

What is fetched over the network is fetched once: a block holds neighbouring samples, which wait in
memory until the lane's shuffling comes to them.
"""

import io
import os
import tempfile
import threading
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from mmscale.data.far import Far, keep
from mmscale.data.lanes import Item
from mmscale.data.manifest import Shard
from mmscale.data.remote import is_pipe, piped, safe_url
from mmscale.errors import DataError

_OPEN_FILES = 64
# Long enough that the round trip is a small part of a fetch.
_BLOCK = 2**21
_FETCHERS = 8
_MOST_AHEAD = 4 * _FETCHERS
# Items of a lane whose blocks are asked for before their turn.
_AHEAD_ITEMS = 64


def bounds(shard: Shard, first: int, after: int) -> tuple[int, int]:
    """Where the samples from `first` to the one before `after` begin and end."""
    return shard.offsets[first], shard.end_of(after - 1)


# What a sample takes up at most as one piece. Of more, such as a film beside its picture, only the
# members are read that somebody asks for.
PIECE = 2**26


class Span(io.RawIOBase):
    """A stretch of a shard as a file, of which only what is read is fetched.

    Args:
        read: Gives the bytes from one place in the shard to another.
        start: First byte of the stretch.
        end: Byte after the last.
    """

    def __init__(self, read: Callable[[int, int], bytes], start: int, end: int):
        super().__init__()
        self._read, self._start, self._size, self._at = read, start, end - start, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """As any file."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As any file."""
        left = max(0, self._size - self._at)
        count = left if size < 0 else min(size, left)
        if count == 0:
            return b""
        start = self._start + self._at
        self._at += count
        return self._read(start, start + count)


class LocalShards:
    """Files of this machine; a bounded number stays open."""

    def __init__(self, shards: Sequence[Shard], paths: Sequence[Path | str]):
        self._shards, self._paths = shards, paths
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()

    def sample(self, shard: int, sample: int) -> bytes | Span:
        """A sample's bytes.

        Raises:
            DataError: The shard is gone, or not what its manifest says; a `Span` raises it too.
        """
        start, end = bounds(self._shards[shard], sample, sample + 1)
        if end - start > PIECE:
            return Span(partial(self._piece, shard), start, end)
        return self._piece(shard, start, end)

    def _piece(self, shard: int, start: int, end: int) -> bytes:
        path, record = Path(self._paths[shard]), self._shards[shard]
        try:
            descriptor = self._open(shard, path).fileno()
            status = os.fstat(descriptor)
            content = os.pread(descriptor, end - start, start)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); restore the shard"
            ) from error
        if status.st_nlink == 0:
            raise DataError(f"{path}: was deleted or replaced during the run; restore the shard")
        if status.st_size != record.bytes or len(content) != end - start:
            raise DataError(
                f"{path}: {status.st_size} bytes, its manifest says {record.bytes}; restore the "
                "shard or pack again (mmscale verify names every fault)"
            )
        return content

    def _open(self, shard: int, path: Path) -> IO[bytes]:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        file = self._files[shard] = path.open("rb", buffering=0)
        return file

    def close(self) -> None:
        """Close every file."""
        while self._files:
            self._files.popitem()[1].close()


class RemoteShards:
    """Shards behind URLs.

    A block is fetched when the first of its samples comes up, ahead of its turn where the order is
    known, by threads. Its other samples wait for theirs; each is let go when it has been taken.

    Args:
        shards: Their manifests' records.
        urls: Where they lie.
        window: Samples that the lanes of this process hold for shuffling.
    """

    def __init__(self, shards: Sequence[Shard], urls: Sequence[Path | str], window: int):
        self._shards = shards
        self._source = _Ranges(shards, [str(url) for url in urls])
        total = sum(shard.sample_bytes for shard in shards)
        mean = total // max(1, sum(shard.samples for shard in shards))
        # Twice the window: blocks at a lane's edges hold samples that this process never takes.
        self._room = 2 * window * mean + _MOST_AHEAD * _BLOCK
        self._held: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._held_bytes = 0
        self._waiting_in: dict[tuple[int, int], int] = {}
        self._coming: dict[tuple[int, int], Future[bytes]] = {}
        self._fetchers: _Fetchers | None = None

    def sample(self, shard: int, sample: int) -> bytes | Span:
        """A sample's bytes.

        Raises:
            DataError: The shard cannot be fetched, or is not what its manifest says; a `Span`
                raises it too.
        """
        start, end = bounds(self._shards[shard], sample, sample + 1)
        if end - start > PIECE:
            return Span(partial(self._source.read, shard), start, end)
        if (shard, sample) in self._held:
            return self._let_go((shard, sample))
        block = self._block(shard, sample)
        if block in self._waiting_in:
            # It was here and has been taken or displaced: not worth its whole block again.
            return self._source.read(shard, *bounds(self._shards[shard], sample, sample + 1))
        coming = self._coming.pop(block, None)
        first, after = self._samples_of(block)
        content = coming.result() if coming else self._fetch(shard, first, after)
        start, _ = bounds(self._shards[shard], first, after)
        for number in range(first, after):
            low, high = bounds(self._shards[shard], number, number + 1)
            self._hold((shard, number), content[low - start : high - start])
        wanted = self._let_go((shard, sample))
        while self._held_bytes > self._room:
            self._let_go(next(iter(self._held)))
        return wanted

    def ahead(self, items: Iterator[Item], is_mine: Sequence[bool]) -> Iterator[Item]:
        """The items; the blocks of those shards that are mine are asked for before their turn."""
        upcoming: deque[Item] = deque()
        for item in items:
            if is_mine[item.shard]:
                self._ask(item)
            upcoming.append(item)
            if len(upcoming) > _AHEAD_ITEMS:
                yield upcoming.popleft()
        yield from upcoming

    def close(self) -> None:
        """Stop fetching; close connections and files."""
        if self._fetchers:
            self._fetchers.close()
        self._source.close()

    def _ask(self, item: Item) -> None:
        block = self._block(item.shard, item.sample)
        if (
            item.sample >= self._samples_of(block)[1]
            or block in self._waiting_in
            or block in self._coming
            or len(self._coming) >= _MOST_AHEAD
        ):
            return
        if self._fetchers is None:
            self._fetchers = _Fetchers(self._source)
        span = bounds(self._shards[item.shard], *self._samples_of(block))
        self._coming[block] = self._fetchers.submit(item.shard, *span)

    def _fetch(self, shard: int, first: int, after: int) -> bytes:
        return self._source.read(shard, *bounds(self._shards[shard], first, after))

    def _block(self, shard: int, sample: int) -> tuple[int, int]:
        return shard, self._shards[shard].offsets[sample] // _BLOCK

    def _samples_of(self, block: tuple[int, int]) -> tuple[int, int]:
        shard, number = block
        offsets = self._shards[shard].offsets
        first, after = (bisect_left(offsets, n * _BLOCK) for n in (number, number + 1))
        # A sample of many blocks is the last that begins in its block, and is read by itself.
        start, end = bounds(self._shards[shard], after - 1, after)
        return first, after - 1 if end - start > PIECE else after

    def _hold(self, place: tuple[int, int], content: bytes) -> None:
        block = self._block(*place)
        self._waiting_in[block] = self._waiting_in.get(block, 0) + 1
        self._held[place] = content
        self._held_bytes += len(content)

    def _let_go(self, place: tuple[int, int]) -> bytes:
        content = self._held.pop(place)
        self._held_bytes -= len(content)
        block = self._block(*place)
        self._waiting_in[block] -= 1
        if not self._waiting_in[block]:
            del self._waiting_in[block]
        return content


class _Ranges:
    """Parts of remote shards. What can only be had whole is kept in a nameless file meanwhile."""

    def __init__(self, shards: Sequence[Shard], urls: Sequence[str]):
        self._shards, self._urls = shards, urls
        self._far = Far()
        self._spools: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._locks = [threading.Lock() for _ in shards]

    def read(self, shard: int, start: int, end: int) -> bytes:
        """Bytes of a shard; may be called by several threads."""
        url, size = self._urls[shard], self._shards[shard].bytes
        if is_pipe(url) or not self._far.has_ranges(url):
            return os.pread(self._spool(shard).fileno(), end - start, start)
        return b"".join(self._far.chunks(url, start, end, size))

    def close(self) -> None:
        """Close connections and files."""
        self._far.close()
        self._spools.clear()

    def _spool(self, shard: int) -> IO[bytes]:
        with self._locks[shard]:
            file = self._spools.pop(shard, None)
            if file is not None:
                self._spools[shard] = file
                return file
            url, size = self._urls[shard], self._shards[shard].bytes
            # Open for as long as anybody reads it.
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            chunks = piped(url) if is_pipe(url) else self._far.chunks(url, size=size)
            with closing(chunks):
                written = keep(chunks, file, size)
            if written != size:
                has = f"more than {size}" if written > size else f"{written}"
                raise DataError(
                    f"{safe_url(url)}: {has} bytes, its manifest says {size}; restore the shard or "
                    "write its manifest again"
                )
            self._spools[shard] = file
            if len(self._spools) > _OPEN_FILES:
                # Not closed here: another thread may be reading it; it goes with its last reader.
                self._spools.popitem(last=False)
            return file


class _Fetchers:
    """Threads that fetch; they end with the process, whatever they wait for."""

    def __init__(self, source: _Ranges):
        self._source = source
        self._jobs: SimpleQueue[tuple[Future[bytes], int, int, int] | None] = SimpleQueue()
        for _ in range(_FETCHERS):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, shard: int, start: int, end: int) -> "Future[bytes]":
        """Fetch bytes of a shard in the background."""
        future: Future[bytes] = Future()
        self._jobs.put((future, shard, start, end))
        return future

    def close(self) -> None:
        """Let the threads end after what they are at."""
        while not self._jobs.empty():
            self._jobs.get()
        for _ in range(_FETCHERS):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, *span = job
            try:
                future.set_result(self._source.read(*span))
            except BaseException as error:  # noqa: BLE001 - raised where the bytes are wanted
                future.set_exception(error)
