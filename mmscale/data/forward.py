"""Tars read forward, without a manifest: whole, or from some place in them on.

A plain tar of known size is entered at any byte: the next header is recognised by its checksum.
What can only be read from its beginning (a command's output, a compressed tar) is counted once.
"""

import tarfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, cast

from mmscale.data.choice import USUAL, Choice
from mmscale.data.damage import DamagedSampleError
from mmscale.data.far import Far
from mmscale.data.mask import is_within
from mmscale.data.members import Sample, sample_of
from mmscale.data.remote import CHUNK, is_address, is_pipe, piped, safe_url
from mmscale.data.shard_set import Place, Stretches
from mmscale.data.tar import (
    Member,
    StrictHeader,
    is_header,
    members_behind,
    members_in,
    samples_in,
)
from mmscale.errors import DataError


@dataclass(frozen=True)
class Reading:
    """What of a shard is read.

    Attributes:
        without: Bytes in which samples that are passed over begin.
        choice: Which members of a sample are what.
    """

    without: Stretches = ()
    choice: Choice = USUAL


WHOLE = Reading()

# So much in a row that no sample is made of, and the shard is given up.
_PASSED_OVER_BYTES = 2**32
_LOOK_BACK = 2**20


def read_through(where: Place, far: Far, reading: Reading = WHOLE) -> Iterator[Sample | str]:
    """Samples of a tar from its first to its last; a text for each that cannot be used.

    Args:
        where: A file, URL or command.
        far: What addresses are read with.
        reading: What of it is read.

    Raises:
        DataError: It cannot be read at all.
    """
    with closing(_chunks(where, far, 0)) as chunks:
        yield from _samples(_Flow(chunks), _short_name(where), reading)


def read_from(
    where: Place, far: Far, part: float, counts: dict[Place, int], reading: Reading = WHOLE
) -> Iterator[Sample | str]:
    """Samples of a tar from a place on.

    Args:
        where: A file, URL or command.
        far: What addresses are read with.
        part: The place: 0 for the beginning, up to 1 for the end. The sample in which it lies is
            left out, the one after it is the first.
        counts: Numbers of samples of the tars that must be read to their end to know them; more
            are noted here.
        reading: As in `read_through`.

    Raises:
        DataError: It cannot be read at all.
    """
    size = _size_to_enter(where, far)
    if size is None:
        if where not in counts:
            counts[where] = sum(1 for _ in read_through(where, far, reading))
        samples = read_through(where, far, reading)
        yield from islice(samples, int(part * counts[where]), None)
        return
    place = int(part * size)
    # Far enough before it to meet the header of the member in which it lies.
    start = max(0, place - _LOOK_BACK) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    with closing(_chunks(where, far, start)) as chunks:
        flow = _from_header(chunks, start)
        # None where the place is in the last member.
        if flow is not None:
            yield from _samples(flow, _short_name(where), reading, place)


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


def _samples(
    flow: "_Flow", name: str, reading: Reading, behind: int = -1
) -> Iterator[Sample | str]:
    """Samples of a tar.

    Args:
        flow: Its bytes, from a header on.
        name: For messages.
        reading: As in `read_through`.
        behind: Byte in a sample that is left out, like all before it.
    """
    try:
        with tarfile.open(
            fileobj=cast(IO[bytes], flow), mode="r|*", bufsize=CHUNK, tarinfo=StrictHeader
        ) as tar:
            wanted = reading.choice.wanted
            members = members_behind(_until_endless(members_in(tar), wanted), flow.start, behind)
            for found in samples_in(members, wanted):
                if is_within(reading.without, flow.start + found.offset):
                    continue
                try:
                    yield sample_of(found, name, choice=reading.choice)
                except DamagedSampleError as error:
                    yield str(error)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make tarfile raise
        yield f"{name}: is not a whole tar ({error})"


def _until_endless(members: Iterable[Member], wanted: Mapping[str, int]) -> Iterator[Member]:
    """The members by whose names samples are made; an error after too many bytes of others."""
    passed_over = 0
    for member in members:
        passed_over = 0 if member.is_wanted(wanted) else passed_over + member.size
        if passed_over > _PASSED_OVER_BYTES:
            raise tarfile.ReadError(f"{passed_over:,} bytes without a sample")
        if member.is_named_as(wanted):
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
