"""A shard walked from its first byte to its last: samples, where each begins and what it holds.

Nothing is extracted to disk; members other than images, `.txt` and `.json` are passed over unread.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmscale.data.members import IMAGE_SUFFIXES, TEXT_BYTES, Description, describe_members

_TAR_BLOCK = 512


class DamagedShardError(Exception):
    """A file that cannot be walked as a tar to its end."""


@dataclass
class FoundSample:
    """One sample as it lies in a tar.

    Attributes:
        key: Name that its members share.
        offset: Byte offset of its first tar header.
        suffixes: Endings of its members, in their order.
        members: Content of its images, `.txt` and `.json`, by ending.
    """

    key: str
    offset: int
    suffixes: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)

    @property
    def description(self) -> Description:
        """What its text and json say."""
        return describe_members(self.key, self.members)


def walk_shard(path: Path) -> Iterator[FoundSample]:
    """Samples of a tar in their order; neighbouring members with one key are one sample.

    Raises:
        DamagedShardError: It is not a whole, uncompressed tar.
    """
    sample: FoundSample | None = None
    for member, read in _walk_members(path):
        key, dot, suffix = _split_name(member.name)
        if not dot or not member.isreg():
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = FoundSample(key, member.offset)
        suffix = suffix.lower()
        sample.suffixes.append(suffix)
        is_text = suffix in ("txt", "json") and member.size <= TEXT_BYTES
        if is_text or suffix in IMAGE_SUFFIXES:
            sample.members[suffix] = read(member)
    if sample is not None:
        yield sample


def _walk_members(
    path: Path,
) -> Iterator[tuple[tarfile.TarInfo, Callable[[tarfile.TarInfo], bytes]]]:
    """Members of a plain tar with a function that reads one."""
    try:
        with tarfile.open(path, "r:") as tar:

            def read(member: tarfile.TarInfo) -> bytes:
                try:
                    file = tar.extractfile(member)
                    return file.read() if file else b""
                except tarfile.TarError as error:
                    raise DamagedShardError(f"ends inside {member.name}") from error

            while (member := tar.next()) is not None:
                yield member, read
                # Else every header of the shard stays in memory.
                tar.members.clear()  # type: ignore[attr-defined]
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DamagedShardError(f"is not a whole, plain tar ({error})") from error
    _check_end(path, end)


def _check_end(path: Path, end: int) -> None:
    # tarfile takes a damaged header in mid-file for the end and says nothing.
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_TAR_BLOCK)
    if len(block) < _TAR_BLOCK or any(block):
        raise DamagedShardError(f"has a damaged tar header, or ends early, at byte {end}")


def _split_name(name: str) -> tuple[str, str, str]:
    """A member's key and ending: as WebDataset does, at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", dot if stem else "", suffix
