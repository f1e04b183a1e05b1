"""Members of a tar of plain files only, ten times faster than tarfile finds them.

Whatever is not plain beyond doubt is left to tarfile: long names, links, other types, odd numbers,
wrong checksums, an early end.
"""

import re

_BLOCK = 512
_MAGIC = (b"ustar\x0000", b"ustar  \0")
_SIZE = re.compile(rb"[0-7]{11}[ \0]")
_CHECKSUM = re.compile(rb"([0-7]{6,7})[ \0]+")


def plain_members(content: bytes) -> list[tuple[str, int, int]] | None:
    """Name, start and end of the data of each member; None where tarfile must judge."""
    found: list[tuple[str, int, int]] = []
    place = 0
    while place < len(content):
        header = content[place : place + _BLOCK]
        if not header.strip(b"\0"):
            return found if found and len(header) == _BLOCK else None
        name = header[: header.find(b"\0", 0, 100)]
        if not name.isascii() or name.endswith(b"/") or not _is_plain(header):
            return None
        start = place + _BLOCK
        end = start + int(header[124:135], 8)
        place = end + -end % _BLOCK
        if place > len(content):
            return None
        found.append((name.decode(), start, end))
    return found or None


def _is_plain(header: bytes) -> bool:
    checksum = _CHECKSUM.fullmatch(header, 148, 156)
    return (
        len(header) == _BLOCK
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
