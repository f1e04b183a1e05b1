"""Shards without a manifest: drawn with replacement, each read forward to its end.

What a lane delivers follows from seed, epoch and lane alone. Draw n of a lane is one shard, whose
samples pass the lane's shuffling buffer in their order; an epoch begins somewhere in the first of
them, so that every sample has the same chance, however short an epoch is. Nothing tells beforehand
where a sample lies, so going on in mid-epoch reads the epoch's part before it again, without
decoding it.

A plain tar of known size is entered at any byte: the next header is recognised by its checksum.
What can only be read from its beginning (a command's output, a compressed tar) is counted once.
"""

import random
import tarfile
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, count, islice
from pathlib import Path
from typing import IO, cast

from mmscale.config.data import DataConfig
from mmscale.data.damage import DamagedSampleError
from mmscale.data.far import Far
from mmscale.data.lanes import seeded
from mmscale.data.members import Sample, image_id_of, sample_of
from mmscale.data.reader import Drawn
from mmscale.data.remote import CHUNK, is_address, is_pipe, piped, safe_url
from mmscale.data.shard_set import Place, ShardSet
from mmscale.data.shards import AT_ONCE, scopes_of
from mmscale.data.tar import (
    Member,
    StrictHeader,
    is_header,
    members_behind,
    members_in,
    samples_in,
)
from mmscale.errors import DataError

# Delivered samples that a lane remembers, to stand in for a damaged one.
_REMEMBERED = 32
# Draws in a row without a sample after which a lane gives up.
_MOST_EMPTY = 100
# Samples that are passed over at most before an epoch begins.
_ON = 16
# A server is asked for the sizes of so many shards; asking for more would delay the start.
_MOST_ASKED = 2_000


@dataclass(frozen=True)
class Resampling:
    """Shards that are drawn from, one in proportion to its source's weight.

    Attributes:
        paths: Where they lie.
        weights: How often each is drawn, against the others.
        epoch_samples: Images that count as an epoch.
        sizes: Bytes of each. An epoch begins in a shard in proportion to them, because a larger one
            has more samples to begin with; none: all count as equally large.
    """

    paths: tuple[Place, ...]
    weights: tuple[float, ...]
    epoch_samples: int
    sizes: tuple[float, ...] = ()
    _counts: dict[Place, int] = field(default_factory=dict, compare=False, repr=False)

    def identified(self, shard: int, content: Sample | str) -> Sample | str:
        """A sample with an id that no other image has.

        An id that its json brings counts within its source, a key within its shard.
        """
        if isinstance(content, str):
            return content
        source, name = self._scopes[shard]
        own = image_id_of(name, content.key) if content.source is None else content.image_id
        # Of the first source as they are; wherever the sources lie.
        return replace(content, image_id=own ^ (seeded("source", source) if source else 0))

    @cached_property
    def _scopes(self) -> list[tuple[int, str]]:
        return scopes_of(self.paths)

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
        DataError: A shard is not there, or the first, which tells the length where nothing else
            does, is not a tar.
    """
    weights = tuple(weight for count, weight in shards.sources for _ in range(count))
    samples = data.epoch_samples
    far = Far()
    if samples is None:
        samples = len(shards.paths) * sum(1 for _ in read_through(shards.paths[0], far))
    sizes = _sizes(shards.paths, far)
    far.close()
    return Resampling(shards.paths, weights, samples, sizes)


def _sizes(paths: Sequence[Place], far: Far) -> tuple[float, ...]:
    """Bytes of each shard, the mean of the others where nobody tells; none where nobody tells any.

    Raises:
        DataError: One is not there.
    """
    asks = sum(map(is_address, paths)) <= _MOST_ASKED
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(
            pool.map(lambda p: size_of(p, far) if asks or not is_address(p) else None, paths)
        )
    known = [size for size in found if size is not None]
    mean = sum(known) / max(1, len(known))
    return tuple(mean if size is None else float(size) for size in found) if mean else ()


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
        """The epoch's items, then, for whoever looks for a stand-in, the ones that follow.

        The pool is full before the first leaves it, else the first batches would be made of
        neighbours, and it is emptied at the end: what is read is what is delivered.
        """
        draw = random.Random(self._seed).random
        # A place in bytes lies in a large sample more often than in a small one: a few samples on,
        # the one that it leads to no longer depends on that.
        source = islice(self._read(), seeded(self._seed, "on") % _ON, None)
        pool = list(islice(source, self._buffer))
        for entering in islice(source, self._length - self._buffer):
            slot = int(draw() * len(pool))
            leaving, pool[slot] = pool[slot], entering
            yield leaving
        while pool:
            slot = int(draw() * len(pool))
            pool[slot], pool[-1] = pool[-1], pool[slot]
            yield pool.pop()
        yield from source

    def _read(self) -> Iterator[Drawn]:
        """Every sample of the drawn shards, endlessly, from some place in the first on."""
        plan = self._resampling
        paths, edges = plan.paths, list(accumulate(plan.weights))
        far, empty = Far(), 0
        for number in count():
            turn, empty = number * self._count + self._index, empty + 1
            if number == 0:
                shard = self._draw(list(accumulate(self._beginnings())), number)
                part = _fraction(self._seed, "part")
                samples = read_from(paths[shard], far, part, plan._counts)
            else:
                shard = self._draw(edges, number)
                samples = read_through(paths[shard], far)
            for sample, content in enumerate(samples):
                empty = 0
                yield Drawn(shard, sample, turn, turn, plan.identified(shard, content))
            if empty >= _MOST_EMPTY:
                raise DataError(
                    f"{safe_url(paths[shard])}: holds no sample, like {empty - 1} drawn before it; "
                    "check data.train"
                )

    def _beginnings(self) -> list[float]:
        """How often an epoch begins in each shard, against the others."""
        weights, sizes = self._resampling.weights, self._resampling.sizes
        return [w * size for w, size in zip(weights, sizes or (1.0,) * len(weights), strict=True)]

    def _draw(self, edges: Sequence[float], number: int) -> int:
        return min(bisect_right(edges, _fraction(self._seed, number) * edges[-1]), len(edges) - 1)


def _fraction(*seed: object) -> float:
    # 53 bits: as many as a float can tell apart below 1.
    return (seeded(*seed) >> 10) / 2**53


# So much in a row that no sample is made of, and the shard is given up.
_PASSED_OVER_BYTES = 2**32
_LOOK_BACK = 2**20


def read_through(where: Place, far: Far) -> Iterator[Sample | str]:
    """Samples of a tar from its first to its last; a text for each that cannot be used.

    Args:
        where: A file, URL or command.
        far: What addresses are read with.

    Raises:
        DataError: It cannot be read at all.
    """
    with closing(_chunks(where, far, 0)) as chunks:
        yield from _samples(_Flow(chunks), _short_name(where))


def read_from(
    where: Place, far: Far, part: float, counts: dict[Place, int]
) -> Iterator[Sample | str]:
    """Samples of a tar from a place on.

    Args:
        where: A file, URL or command.
        far: What addresses are read with.
        part: The place: 0 for the beginning, up to 1 for the end. The sample in which it lies is
            left out, the one after it is the first.
        counts: Numbers of samples of the tars that must be read to their end to know them; more
            are noted here.

    Raises:
        DataError: It cannot be read at all.
    """
    size = _size_to_enter(where, far)
    if size is None:
        if where not in counts:
            counts[where] = sum(1 for _ in read_through(where, far))
        yield from islice(read_through(where, far), int(part * counts[where]), None)
        return
    place = int(part * size)
    # Far enough before it to meet the header of the member in which it lies.
    start = max(0, place - _LOOK_BACK) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    with closing(_chunks(where, far, start)) as chunks:
        flow = _from_header(chunks, start)
        # None where the place is in the last member.
        if flow is not None:
            yield from _samples(flow, _short_name(where), place)


def size_of(where: Place, far: Far) -> int | None:
    """Bytes of a shard; None where nobody tells.

    Raises:
        DataError: It is not there.
    """
    if is_pipe(where):
        return None
    if is_address(where):
        return far.opening(str(where))[1]
    with _named(where):
        return Path(where).stat().st_size


def _size_to_enter(where: Place, far: Far) -> int | None:
    """Size of a plain tar; None for what must be read from its beginning."""
    if is_pipe(where):
        return None
    if is_address(where):
        opening, size = far.opening(str(where))
        return size if is_header(opening) else None
    with _named(where), Path(where).open("rb") as file:
        return size_of(where, far) if is_header(file.read(tarfile.BLOCKSIZE)) else None


@contextmanager
def _named(where: Place) -> Iterator[None]:
    """Tell what keeps a file from being read with its name."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); restore it") from error


def _from_header(chunks: Iterator[bytes], start: int) -> "_Flow | None":
    """The chunks, which begin at a block's edge, from the first tar header in them on, if any."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        whole = len(rest) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        for at in range(0, whole, tarfile.BLOCKSIZE):
            if is_header(rest[at : at + tarfile.BLOCKSIZE]):
                return _Flow(chain([rest[at:]], chunks), start + at)
        rest, start = rest[whole:], start + whole
    return None


def _samples(flow: "_Flow", name: str, behind: int = -1) -> Iterator[Sample | str]:
    """Samples of a tar.

    Args:
        flow: Its bytes, from a header on.
        name: For messages.
        behind: Byte in a sample that is left out, like all before it.
    """
    try:
        with tarfile.open(
            fileobj=cast(IO[bytes], flow), mode="r|*", bufsize=CHUNK, tarinfo=StrictHeader
        ) as tar:
            members = members_behind(_until_endless(members_in(tar)), flow.start, behind)
            for found in samples_in(members):
                try:
                    yield sample_of(found, name)
                except DamagedSampleError as error:
                    yield str(error)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make tarfile raise
        yield f"{name}: is not a whole tar ({error})"


def _until_endless(members: Iterable[Member]) -> Iterator[Member]:
    """The members by whose names samples are made; an error after too many bytes of others."""
    passed_over = 0
    for member in members:
        passed_over = 0 if member.is_wanted else passed_over + member.size
        if passed_over > _PASSED_OVER_BYTES:
            raise tarfile.ReadError(f"{passed_over:,} bytes without a sample")
        if member.is_named_as_wanted:
            yield member


def _short_name(where: Place) -> str:
    return str(where) if is_pipe(where) else safe_url(where).rpartition("/")[2]


def _chunks(where: Place, far: Far, start: int) -> Generator[bytes, None, None]:
    if is_pipe(where):
        yield from piped(str(where))
    elif is_address(where):
        yield from far.chunks(str(where), start)
    else:
        with _named(where), Path(where).open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk


class _Flow:
    """Chunks from byte `start` of a shard on, as the file that tarfile wants: it reads forward."""

    def __init__(self, chunks: Iterator[bytes], start: int = 0):
        self._chunks, self._rest, self.start = chunks, b"", start

    def read(self, size: int) -> bytes:
        content = self._rest or next(self._chunks, b"")
        self._rest = content[size:]
        return content[:size]
