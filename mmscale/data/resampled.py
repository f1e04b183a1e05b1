"""Shards without a manifest: drawn with replacement, each read through from its first byte.

What a lane delivers follows from seed, epoch and lane alone: draw n of a lane is one shard, its
samples pass the lane's shuffling buffer in their order. Nothing tells beforehand where a sample
lies, so going on in mid-epoch reads the epoch's part before it again, without decoding it.
"""

import random
import tarfile
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, count, islice
from pathlib import Path
from typing import IO, cast

from mmscale.config.schema import DataConfig
from mmscale.data.lanes import seeded
from mmscale.data.reader import DamagedSampleError, Drawn, Sample, sample_of, wanted_name
from mmscale.data.remote import CHUNK, Web, is_pipe, is_web, piped, shown
from mmscale.data.shards import Place, ShardSet
from mmscale.data.tar_header import SoundHeader
from mmscale.errors import DataError

# Delivered samples that a lane remembers, to stand in for a damaged one.
_REMEMBERED = 32
# Draws in a row without a sample after which a lane gives up.
_MOST_EMPTY = 100
# A larger member is no photograph.
_MEMBER_BYTES = 2**28


@dataclass(frozen=True)
class Resampling:
    """Shards that are drawn from, one in proportion to its source's weight.

    Attributes:
        paths: Where they lie.
        weights: How often each is drawn, against the others.
        epoch_samples: Images that count as an epoch.
    """

    paths: tuple[Place, ...]
    weights: tuple[float, ...]
    epoch_samples: int

    def lanes(
        self, count: int, length: int, buffer: int, seed: int, epoch: int
    ) -> "list[SequentialLane]":
        """The lanes of one epoch; each reads its own shards."""
        return [
            SequentialLane(self, lane, count, length, buffer, seed, epoch) for lane in range(count)
        ]


def plan_resampling(data: DataConfig, shards: ShardSet) -> Resampling:
    """What is drawn, and how long an epoch is.

    Raises:
        DataError: The first shard, which tells the length where nothing else does, is not a tar.
    """
    weights = tuple(weight for count, weight in shards.sources for _ in range(count))
    samples = data.epoch_samples
    if samples is None:
        web = Web()
        first = sum(1 for _ in read_through(shards.paths[0], web))
        web.close()
        samples = first * len(shards.paths)
    return Resampling(shards.paths, weights, samples)


class SequentialLane:
    """One lane of a resampled epoch: its samples in the order in which they are delivered.

    Args:
        resampling: What it draws from.
        index: Which lane.
        count: Lanes in all.
        length: Items in every lane.
        buffer: Samples held for shuffling, as raw bytes.
        seed: The run's seed.
        epoch: Which epoch.
    """

    def __init__(
        self,
        resampling: Resampling,
        index: int,
        count: int,
        length: int,
        buffer: int,
        seed: int,
        epoch: int,
    ):
        self._resampling, self._index, self._count = resampling, index, count
        self._length, self._buffer = length, min(buffer, length)
        self._seed = seeded(seed, epoch, "draws", index)
        self._delivered = 0
        self._past: deque[Drawn] = deque(maxlen=_REMEMBERED)
        self._next: deque[Drawn] = deque()
        self._source = self._shuffled()

    def items(self, start: int = 0) -> Iterator[Drawn]:
        """Items from the `start`-th on; getting there reads the shards so far. Once only."""
        while self._delivered < self._length:
            item = self._next.popleft() if self._next else next(self._source)
            self._past.append(item)
            self._delivered += 1
            if self._delivered > start:
                yield item

    def around(self, place: int) -> Iterator[Drawn]:
        """What may stand in for the item at `place`: some earlier ones, then some later."""
        past = list(self._past)
        at = max(0, place - self._delivered + len(past))
        yield from reversed(past[:at])
        yield from past[at + 1 :]
        for offset in range(_REMEMBERED):
            if offset == len(self._next):
                self._next.append(next(self._source))
            yield self._next[offset]

    def _shuffled(self) -> Iterator[Drawn]:
        draw = random.Random(self._seed).random
        source = self._read()
        pool: list[Drawn] = []
        # It fills by one sample a delivery, so that the first batch does not wait for all of it.
        for size in count(self._buffer // 8 + 1):
            pool += islice(source, min(size, self._buffer) - len(pool))
            slot = int(draw() * len(pool))
            pool[slot], pool[-1] = pool[-1], pool[slot]
            yield pool.pop()

    def _read(self) -> Iterator[Drawn]:
        """Every sample of the drawn shards, endlessly."""
        paths, edges = self._resampling.paths, list(accumulate(self._resampling.weights))
        web, empty = Web(), 0
        for number in count():
            # 53 bits: as many as a float can tell apart below 1.
            drawn = (seeded(self._seed, number) >> 10) / 2**53 * edges[-1]
            shard = min(bisect_right(edges, drawn), len(paths) - 1)
            turn, empty = number * self._count + self._index, empty + 1
            for sample, content in enumerate(read_through(paths[shard], web)):
                empty = 0
                yield Drawn(shard, sample, turn, turn, content)
            if empty >= _MOST_EMPTY:
                raise DataError(
                    f"{shown(paths[shard])}: holds no sample, like {empty - 1} drawn before it; "
                    "check data.train"
                )


def read_through(where: Place, web: Web) -> Iterator[Sample | str]:
    """Samples of a tar from its first to its last; a text for each that cannot be used.

    Args:
        where: A file, URL or command.
        web: What URLs are read with.

    Raises:
        DataError: It cannot be read at all.
    """
    name = _short_name(where)
    key: str | None = None
    members: dict[str, bytes] = {}
    with closing(_chunks(where, web)) as chunks:
        try:
            with tarfile.open(
                fileobj=cast(IO[bytes], _Flow(chunks)), mode="r|*", bufsize=CHUNK, tarinfo=_Header
            ) as tar:
                while (member := tar.next()) is not None:
                    # Else every header of the shard stays in memory.
                    tar.members.clear()  # type: ignore[attr-defined]
                    base, suffix = wanted_name(member)
                    if base is None or member.size > _MEMBER_BYTES:
                        continue
                    if key is not None and base != key:
                        yield _sample(key, members, name)
                        members = {}
                    file = tar.extractfile(member)
                    assert file is not None, "a regular member has content"
                    key, members[suffix] = base, file.read()
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever damaged bytes make tarfile raise
            yield f"{name}: is not a whole tar ({error})"
            return
    if key is not None:
        yield _sample(key, members, name)


def _sample(key: str, members: dict[str, bytes], name: str) -> Sample | str:
    try:
        return sample_of(key, members, name)
    except DamagedSampleError as error:
        return str(error)


def _short_name(where: Place) -> str:
    return str(where) if is_pipe(where) else shown(where).rpartition("/")[2]


def _chunks(where: Place, web: Web) -> Generator[bytes, None, None]:
    if is_pipe(where):
        yield from piped(str(where))
    elif is_web(where):
        yield from web.chunks(str(where))
    else:
        try:
            with Path(where).open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror}); restore it") from error


class _Flow:
    """Chunks as the file that tarfile wants; it only reads forward."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        content = self._rest or next(self._chunks, b"")
        self._rest = content[size:]
        return content[:size]


class _Header(SoundHeader):
    """A tar header; a damaged one is an error, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
