"""Tars from anywhere, walked from first byte to last: their samples and where each begins.

Nothing is extracted to disk; members other than images, `.txt` and `.json` are passed over unread.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale.data.members import IMAGE_SUFFIXES, Description, describe_members, largest_member

_CHUNK = 2**20


# What other files than tars begin with, what they are, and what makes a tar of them.
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it with zstd -d"),
    (b"BZh", "bzip2", "bunzip2 it"),
    (b"\xfd7zXZ", "xz", "unxz it"),
    (b"PK\x03\x04", "zip", "unzip it and pack a tar"),
)


class DamagedShardError(Exception):
    """A file that cannot be walked as a tar to its end.

    Args:
        fault: What is wrong with it.
        repair: What to do.
    """

    def __init__(self, fault: str, repair: str = "fetch or pack the shard again"):
        super().__init__(fault)
        self.repair = repair


@dataclass
class FoundSample:
    """One sample as it lies in a tar.

    Attributes:
        key: Name that its members share.
        offset: Byte offset of its first tar header.
        suffixes: Endings of its members, in their order.
        members: Content of its images, `.txt` and `.json`, by ending.
        counted: How many captions its manifest counted; None before there is one.
    """

    key: str
    offset: int
    suffixes: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    counted: int | None = None

    @property
    def description(self) -> Description:
        """What its text and json say."""
        return describe_members(self.key, self.members, self.counted)


def walk_shard(path: Path) -> Iterator[FoundSample]:
    """Samples of a tar in their order; neighbouring members with one key are one sample.

    Raises:
        DamagedShardError: It is not a whole, uncompressed tar.
        OSError: It cannot be read.
    """
    sample: FoundSample | None = None
    for member, read in _walk_members(path):
        key, dot, suffix = _split_name(member.name)
        # A sparse member of a few bytes may unfold to any size.
        if not dot or not member.isreg() or member.issparse():
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = FoundSample(key, member.offset)
        suffix = suffix.lower()
        sample.suffixes.append(suffix)
        wanted = suffix in ("txt", "json", *IMAGE_SUFFIXES)
        if wanted and member.size <= largest_member(suffix):
            sample.members[suffix] = read(member)
    if sample is not None:
        yield sample


def _walk_members(
    path: Path,
) -> Iterator[tuple[tarfile.TarInfo, Callable[[tarfile.TarInfo], bytes]]]:
    """Members of a plain tar with a function that reads one."""
    if not path.is_file():
        # A pipe in its place would never be opened.
        raise DamagedShardError("is missing, or not a file")
    _refuse_packed(path)
    with _open(path) as tar:

        def read(member: tarfile.TarInfo) -> bytes:
            try:
                file = tar.extractfile(member)
                return file.read() if file else b""
            except tarfile.TarError as error:
                raise DamagedShardError(f"ends inside {member.name}") from error

        while (member := _next(tar)) is not None:
            yield member, read
            # Else every header of the shard stays in memory.
            tar.members.clear()  # type: ignore[attr-defined]
        end = tar.offset
    _check_end(path, end)


def _refuse_packed(path: Path) -> None:
    with path.open("rb") as file:
        begins = file.read(8)
    for magic, form, repair in _PACKED:
        if begins.startswith(magic):
            raise DamagedShardError(f"is compressed by {form}, not a plain tar", repair)


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:", tarinfo=SoundHeader)
    except OSError:
        raise
    except Exception as error:
        raise _not_a_tar(error) from error


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except OSError:
        raise
    except Exception as error:
        raise _not_a_tar(error) from error


def _not_a_tar(error: Exception) -> DamagedShardError:
    # Damaged headers make tarfile raise much else than its own errors.
    return DamagedShardError(f"is not a whole, plain tar ({str(error) or type(error).__name__})")


def _check_end(path: Path, end: int) -> None:
    # tarfile takes a damaged header in mid-file for the end and says nothing.
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise DamagedShardError(f"has a damaged tar header, or ends early, at byte {end}")
        while rest := file.read(_CHUNK):
            if rest.strip(b"\0"):
                raise DamagedShardError(f"goes on behind its end at byte {end}")


def _split_name(name: str) -> tuple[str, str, str]:
    """A member's key and ending: as WebDataset does, at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", dot if stem else "", suffix


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
