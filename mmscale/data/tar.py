"""Tars from anywhere, read as samples: the one place that knows how members become a sample.

Nothing is extracted to disk, and no member is read but images, `.txt` and `.json` up to a size.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import IO, Any, cast

from webdataset.tariterators import base_plus_ext

from mmscale.data.damage import DamagedShardError

# In order of preference, where a sample holds several.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# A text or description longer than this is passed over unread.
TEXT_BYTES = 16 * 2**20
# A larger image is no photograph.
IMAGE_BYTES = 2**28
# Bytes up to which a member is read, by its ending, or by `ANY` where that has none of its own.
WANTED = {"txt": TEXT_BYTES, "json": TEXT_BYTES, **dict.fromkeys(IMAGE_SUFFIXES, IMAGE_BYTES)}
ANY = "*"
# Of one sample; the rest of them is not looked at.
_MOST_MEMBERS = 10_000
_CHUNK = 2**20


@dataclass(slots=True)
class Member:
    """A file in a tar.

    Attributes:
        offset: Byte offset of its header.
        key: Name of the sample that it belongs to; None where it is no regular file, or its name
            has no ending.
        suffix: Its ending: all that follows the first dot of the file name, in lower case.
        size: Bytes of its content.
        read: Gives the content, before the next member is asked for.
    """

    offset: int
    key: str | None
    suffix: str
    size: int
    read: Callable[[], bytes]

    def is_named_as(self, wanted: Mapping[str, int]) -> bool:
        """Whether it is an image, a text or a description by its name."""
        return self.key is not None and (self.suffix in wanted or ANY in wanted)

    def is_wanted(self, wanted: Mapping[str, int]) -> bool:
        """Whether its content is read: it is one by its name, and not too large."""
        most = wanted.get(self.suffix, wanted.get(ANY, -1))
        return self.key is not None and self.size <= most


@dataclass
class TarSample:
    """One sample as it lies in a tar.

    Attributes:
        key: Name that its members share.
        offset: Byte offset of its first tar header.
        suffixes: Endings of its members, in their order.
        members: Content of those that are wanted, such as images, `.txt` and `.json`, by ending.
    """

    key: str
    offset: int = 0
    suffixes: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)


def samples_in(
    members: Iterable[Member], wanted: Mapping[str, int] = WANTED
) -> Iterator[TarSample]:
    """Neighbouring members with one key as one sample, in their order.

    Args:
        members: All there are.
        wanted: Most bytes of those that are read, by ending.
    """
    sample: TarSample | None = None
    for member in members:
        if member.key is None:
            continue
        if sample is None or sample.key != member.key:
            if sample is not None:
                yield sample
            sample = TarSample(member.key, member.offset)
        sample.suffixes.append(member.suffix)
        if member.is_wanted(wanted):
            sample.members[member.suffix] = member.read()
    if sample is not None:
        yield sample


def members_in(tar: tarfile.TarFile) -> Iterator[Member]:
    """Members of an open tar in their order.

    Raises:
        Exception: Whatever a damaged header makes tarfile raise.
    """
    while (info := tar.next()) is not None:
        # Else every header of the shard stays in memory.
        tar.members.clear()  # type: ignore[attr-defined]
        # A sparse member of a few bytes may unfold to any size.
        is_plain = info.isreg() and not info.issparse()
        named = _key_and_suffix(info.name) if is_plain else (None, "")
        yield Member(info.offset, *named, info.size, partial(_content, tar, info))


def _key_and_suffix(name: str) -> tuple[str | None, str]:
    key, suffix = base_plus_ext(name)
    # A file whose name begins with a dot is nobody's, in a folder too.
    return (None, "") if key is None or key.endswith("/") else (key, suffix.lower())


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None, "a regular member has content"
    try:
        return file.read()
    except tarfile.ReadError as error:
        raise tarfile.ReadError(f"ends inside {info.name}") from error


def sample_in(
    content: "bytes | io.RawIOBase", wanted: Mapping[str, int] = WANTED
) -> TarSample | None:
    """The sample that a piece of a tar begins with; None where no member of it is `wanted`.

    Raises:
        Exception: Whatever a damaged header makes tarfile raise.
    """
    members = islice(_members_of_piece(content), _MOST_MEMBERS)
    read = (member for member in members if member.is_wanted(wanted))
    return next(samples_in(read, wanted), None)


def _members_of_piece(content: "bytes | io.RawIOBase") -> Iterator[Member]:
    if isinstance(content, bytes):
        plain = plain_members(content)
        if plain is not None:
            for name, start, end in plain:
                offset, read = start - tarfile.BLOCKSIZE, partial(_part, content, start, end)
                yield Member(offset, *_key_and_suffix(name), end - start, read)
            return
        content = cast(io.RawIOBase, io.BytesIO(content))
    with tarfile.open(fileobj=cast(IO[bytes], content), mode="r:", tarinfo=SoundHeader) as tar:
        yield from members_in(tar)


def members_behind(members: Iterable[Member], start: int, behind: int) -> Iterator[Member]:
    """The members of samples that begin behind a byte; none are left out where that is negative.

    Args:
        members: Those of a tar that is read from some header on.
        start: Place of that header.
        behind: The byte.
    """
    passed: str | None = None
    for member in members:
        offset = start + member.offset
        # An earlier header, which was not read, may hold the first member's whole name.
        if 0 < offset == start:
            continue
        if behind >= 0 and (offset <= behind or passed in (None, member.key)):
            passed = member.key
            continue
        behind = -1
        yield member


def _part(content: bytes, start: int, end: int) -> bytes:
    return content[start:end]


def walk_shard(file: IO[bytes], wanted: Mapping[str, int] = WANTED) -> Iterator[TarSample]:
    """Samples of an open tar from its first byte to its last.

    Raises:
        DamagedShardError: It is not a whole, uncompressed tar.
        OSError: It cannot be read.
    """
    with telling_damage():
        yield from samples_in(walk_members(file), wanted)


def walk_members(file: IO[bytes]) -> Iterator[Member]:
    """Members of an open tar from its first byte to its last; raises as `walk_shard` does.

    Whoever reads a member's content does so within `telling_damage`.
    """
    _refuse_packed(file)
    with telling_damage():
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", tarinfo=SoundHeader) as tar:
            yield from members_in(tar)
            end = tar.offset
        _check_end(file, end)


@contextmanager
def telling_damage() -> Iterator[None]:
    """Lines that read a tar: what tarfile raises becomes a DamagedShardError."""
    try:
        yield
    except (OSError, DamagedShardError):
        raise
    except Exception as error:
        # Damaged headers make tarfile raise much else than its own errors.
        reason = str(error) or type(error).__name__
        raise DamagedShardError(f"is not a whole, plain tar ({reason})") from error


# What other files than tars begin with, what they are, and what makes a tar of them.
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it with zstd -d"),
    (b"BZh", "bzip2", "bunzip2 it"),
    (b"\xfd7zXZ", "xz", "unxz it"),
    (b"PK\x03\x04", "zip", "unzip it and pack a tar"),
)


def _refuse_packed(file: IO[bytes]) -> None:
    file.seek(0)
    begins = file.read(8)
    for magic, form, repair in _PACKED:
        if begins.startswith(magic):
            raise DamagedShardError(f"is compressed by {form}, not a plain tar", repair)


def _check_end(file: IO[bytes], end: int) -> None:
    # tarfile takes a damaged header in mid-file for the end and says nothing.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise DamagedShardError(f"has a damaged tar header, or ends early, at byte {end}")
    while rest := file.read(_CHUNK):
        if rest.strip(b"\0"):
            raise DamagedShardError(f"goes on behind its end at byte {end}")


_MAGIC = (b"ustar\x0000", b"ustar  \0")
_SIZE = re.compile(rb"[0-7]{11}[ \0]")
_CHECKSUM = re.compile(rb"([0-7]{6,7})[ \0]+")


def plain_members(content: bytes) -> list[tuple[str, int, int]] | None:
    """Name, start and end of the data of each member, ten times faster than tarfile finds them.

    Returns:
        None where a member is not plain beyond doubt, and tarfile must judge: long names, links,
        other types, odd numbers, wrong checksums, an early end.
    """
    found: list[tuple[str, int, int]] = []
    place = 0
    while place < len(content):
        header = content[place : place + tarfile.BLOCKSIZE]
        if not header.strip(b"\0"):
            return found if found and len(header) == tarfile.BLOCKSIZE else None
        name = header[: header.find(b"\0", 0, 100)]
        if not name.isascii() or name.endswith(b"/") or not _is_plain(header):
            return None
        start = place + tarfile.BLOCKSIZE
        end = start + int(header[124:135], 8)
        place = end + -end % tarfile.BLOCKSIZE
        if place > len(content):
            return None
        found.append((name.decode(), start, end))
    return found or None


def _is_plain(header: bytes) -> bool:
    checksum = _CHECKSUM.fullmatch(header, 148, 156)
    return (
        len(header) == tarfile.BLOCKSIZE
        and header[0] != 0
        and 0 in header[:100]
        and header[156] in b"0\0"
        and header[257:265] in _MAGIC
        # A prefix of the name, or GNU's times and sparse map.
        and not header[345:].strip(b"\0")
        and _SIZE.fullmatch(header, 124, 136) is not None
        and checksum is not None
        and int(checksum[1], 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    )


# Names and sizes need some hundred bytes. tarfile's search for fields is quadratic in this.
_EXTENDED_BYTES = 2**14
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class SoundHeader(tarfile.TarInfo):
    """A header for `tarfile.open(..., tarinfo=SoundHeader)`.

    A negative size would lead back to headers that were read before, a long extended header would
    keep the parser busy for hours.

    Raises:
        tarfile.ReadError: Where it is read, if it is one of these.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        self._require_size()
        if self.type in _EXTENDED and self.size > _EXTENDED_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _apply_pax_info(self, *arguments: Any) -> None:
        super()._apply_pax_info(*arguments)  # type: ignore[misc]
        self._require_size()

    def _require_size(self) -> None:
        if self.size < 0:
            raise tarfile.ReadError(f"a size of {self.size} bytes")


class StrictHeader(SoundHeader):
    """A header for tars that are read forward, whose end nobody can look at.

    Raises:
        tarfile.ReadError: Where it is read, if it is damaged: tarfile would take it for the end.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "StrictHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


# As any program writes it.
_ANY_CHECKSUM = re.compile(rb"[ 0]*[0-7]{3,7}[ \0]+")


def is_header(block: bytes) -> bool:
    """Whether a block is the header of a member, by its checksum."""
    if _ANY_CHECKSUM.fullmatch(block, 148, 156) is None:
        return False
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
