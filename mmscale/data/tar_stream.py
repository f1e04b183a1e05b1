"""Samples of a tar that is read forward, without a manifest: all of them, or from a place on.

A plain tar of known size is entered at any byte: the next header is recognised by its checksum.
What can only be read from its beginning (a command's output, a compressed tar) is counted once.
"""

import re
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import IO, TypeVar, cast

from mmscale.data.members import largest_member
from mmscale.data.reader import DamagedSampleError, Sample, sample_of, wanted_name
from mmscale.data.remote import CHUNK, Web, is_pipe, is_web, piped, shown
from mmscale.data.shard_set import Place
from mmscale.data.walk import SoundHeader
from mmscale.errors import DataError

Found = TypeVar("Found")

# So much in a row that no sample is made of, and the shard is given up.
_PASSED_OVER_BYTES = 2**32
_LOOK_BACK = 2**20
_CHECKSUM = re.compile(rb"[ 0]*[0-7]{3,7}[ \0]+")


def read_through(where: Place, web: Web) -> Iterator[Sample | str]:
    """Samples of a tar from its first to its last; a text for each that cannot be used.

    Args:
        where: A file, URL or command.
        web: What URLs are read with.

    Raises:
        DataError: It cannot be read at all.
    """
    with closing(_chunks(where, web, 0)) as chunks:
        yield from _samples(_Flow(chunks), _short_name(where))


def read_from(
    where: Place, web: Web, part: float, counts: dict[Place, int]
) -> Iterator[Sample | str]:
    """Samples of a tar from a place on.

    Args:
        where: A file, URL or command.
        web: What URLs are read with.
        part: The place: 0 for the beginning, up to 1 for the end. The sample in which it lies is
            left out, the one after it is the first.
        counts: Numbers of samples of the tars that must be read to their end to know them; more
            are noted here.

    Raises:
        DataError: It cannot be read at all.
    """
    size = _size_to_enter(where, web)
    if size is None:
        if where not in counts:
            counts[where] = sum(1 for _ in read_through(where, web))
        yield from islice(read_through(where, web), int(part * counts[where]), None)
        return
    place = int(part * size)
    # Far enough before it to meet the header of the member in which it lies.
    start = max(0, place - _LOOK_BACK) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    with closing(_chunks(where, web, start)) as chunks:
        flow = _from_header(chunks, start)
        # None where the place is in the last member.
        if flow is not None:
            yield from _samples(flow, _short_name(where), place)


def size_of(where: Place, web: Web) -> int | None:
    """Bytes of a shard; None where nobody tells.

    Raises:
        DataError: It is not there.
    """
    if is_pipe(where):
        return None
    if is_web(where):
        return web.opening(str(where))[1]
    return _on_file(where, lambda path: path.stat().st_size)


def _size_to_enter(where: Place, web: Web) -> int | None:
    """Size of a plain tar; None for what must be read from its beginning."""
    if is_pipe(where):
        return None
    if is_web(where):
        opening, size = web.opening(str(where))
    else:
        opening = _on_file(where, _opening)
        size = size_of(where, web)
    return size if _is_header(opening) else None


def _opening(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(tarfile.BLOCKSIZE)


def _on_file(where: Place, act: Callable[[Path], Found]) -> Found:
    try:
        return act(Path(where))
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); restore it") from error


def _from_header(chunks: Iterator[bytes], start: int) -> "_Flow | None":
    """The chunks, which begin at a block's edge, from the first tar header in them on, if any."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        whole = len(rest) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        for at in range(0, whole, tarfile.BLOCKSIZE):
            if _is_header(rest[at : at + tarfile.BLOCKSIZE]):
                return _Flow(chain([rest[at:]], chunks), start + at)
        rest, start = rest[whole:], start + whole
    return None


def _is_header(block: bytes) -> bool:
    if _CHECKSUM.fullmatch(block, 148, 156) is None:
        return False
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _samples(flow: "_Flow", name: str, behind: int = -1) -> Iterator[Sample | str]:
    """Samples of a tar.

    Args:
        flow: Its bytes, from a header on.
        name: For messages.
        behind: Byte in a sample that is left out, like all before it.
    """
    key: str | None = None
    passed: str | None = None
    members: dict[str, bytes] = {}
    try:
        for offset, base, suffix, content in _members(flow):
            # An earlier header, which was not read, may hold the first member's whole name.
            if base is None or 0 < offset == flow.start:
                continue
            if behind >= 0 and (offset <= behind or passed in (None, base)):
                passed = base
                continue
            behind = -1
            if key is not None and base != key:
                yield _sample(key, members, name)
                members = {}
            key = base
            if content is not None:
                members[suffix] = content
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make tarfile raise
        yield f"{name}: is not a whole tar ({error})"
        return
    if key is not None:
        yield _sample(key, members, name)


def _members(flow: "_Flow") -> Iterator[tuple[int, str | None, str, bytes | None]]:
    """Place, key, ending and content of each member.

    No key where it is of no use, no content where that is too large.
    """
    passed_over = 0
    with tarfile.open(
        fileobj=cast(IO[bytes], flow), mode="r|*", bufsize=CHUNK, tarinfo=_Header
    ) as tar:
        while (member := tar.next()) is not None:
            # Else every header of the shard stays in memory.
            tar.members.clear()  # type: ignore[attr-defined]
            base, suffix = wanted_name(member)
            place = flow.start + member.offset
            if base is None or member.size > largest_member(suffix):
                passed_over += member.size
                if passed_over > _PASSED_OVER_BYTES:
                    raise tarfile.ReadError(f"{passed_over:,} bytes without a sample")
                yield place, base, suffix, None
                continue
            passed_over = 0
            file = tar.extractfile(member)
            assert file is not None, "a regular member has content"
            yield place, base, suffix, file.read()


def _sample(key: str, members: dict[str, bytes], name: str) -> Sample | str:
    try:
        return sample_of(key, members, name)
    except DamagedSampleError as error:
        return str(error)


def _short_name(where: Place) -> str:
    return str(where) if is_pipe(where) else shown(where).rpartition("/")[2]


def _chunks(where: Place, web: Web, start: int) -> Generator[bytes, None, None]:
    if is_pipe(where):
        yield from piped(str(where))
    elif is_web(where):
        yield from web.chunks(str(where), start)
    else:
        try:
            with Path(where).open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK):
                    yield chunk
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror}); restore it") from error


class _Flow:
    """Chunks as the file that tarfile wants; it only reads forward.

    Attributes:
        start: Place of the first byte in the whole file.
    """

    def __init__(self, chunks: Iterator[bytes], start: int = 0):
        self._chunks, self._rest, self.start = chunks, b"", start

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
