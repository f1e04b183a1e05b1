"""The long lists of a manifest, found in its bytes but read only where somebody looks into them.

A run looks into one shard after another; turning millions of numbers into objects before the first
batch would take longer than anything else.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any, TypeAlias, overload

_FIELDS = frozenset((b"offsets", b"captions", b"images", b"groups", b"labels"))
_OPENING = b'": ['
# What stands for a list in the rest of the manifest; no manifest that was written before knows it.
_MARK = f"list {os.urandom(16).hex()}"


class Unread(Sequence):
    """A list of whole numbers in JSON.

    Args:
        content: The JSON.
        start: Place after its opening bracket.
        end: Place of its closing bracket.

    Attributes:
        check: Turns what is found there into numbers, or raises.
    """

    # Several a shard: without a dictionary each.
    __slots__ = ("_content", "_end", "_length", "_start", "_values", "check")

    def __init__(self, content: bytes, start: int, end: int):
        self._content, self._start, self._end = content, start, end
        # The first bytes tell, of any list that is not all blanks.
        is_filled = content[start : min(start + 9, end)].strip() or content[start:end].strip()
        self._length = content.count(b",", start, end) + 1 if is_filled else 0
        self._values: array[int] | None = None
        self.check: Callable[[Any], tuple[int, ...]] = tuple

    @property
    def raw(self) -> bytes:
        """What stands between the brackets, before anything was mapped."""
        return self._content[self._start : self._end]

    def mapped(self, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> "Unread":
        """What `change` makes of the checked numbers; as many, and read as late."""
        other = copy(self)
        other._values, other.check = None, partial(_checked, self.check, change)
        return other

    def _read(self) -> "array[int]":
        if self._values is None:
            try:
                found = json.loads(b"[" + self._content[self._start : self._end] + b"]")
            except (ValueError, RecursionError):
                found = None
            self._values = array("q", self.check(found))
        return self._values

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        return self._read()[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def _checked(
    check: Callable[[Any], tuple[int, ...]],
    change: Callable[[tuple[int, ...]], tuple[int, ...]],
    found: Any,
) -> tuple[int, ...]:
    return change(check(found))


Counts: TypeAlias = tuple[int, ...] | Unread


def raw(counts: Counts) -> bytes:
    """The numbers as they are written in JSON."""
    return counts.raw if isinstance(counts, Unread) else json.dumps(counts)[1:-1].encode()


def mapped(counts: Counts, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Counts:
    """What `change` makes of the numbers, when somebody looks into them."""
    return counts.mapped(change) if isinstance(counts, Unread) else change(counts)


def load_json(content: bytes) -> Any:
    """JSON with its long lists left unread.

    Raises:
        ValueError: The rest is not JSON.
    """
    spans: list[tuple[int, int]] = []
    parts: list[bytes] = []
    place = 0
    opening = content.find(_OPENING)
    while opening >= 0:
        start = opening + len(_OPENING)
        if content[content.rfind(b'"', 0, opening) + 1 : opening] in _FIELDS:
            end = content.find(b"]", start)
            if end < 0:
                break
            parts += [content[place : start - 1], b'{"%s": %d}' % (_MARK.encode(), len(spans))]
            spans.append((start, end))
            place = end + 1
            start = place
        opening = content.find(_OPENING, start)
    skeleton = b"".join([*parts, content[place:]])

    def restore(mapping: dict[str, Any]) -> Any:
        number = mapping.get(_MARK)
        if isinstance(number, int) and 0 <= number < len(spans):
            return Unread(content, *spans[number])
        return mapping

    return json.loads(skeleton, object_hook=restore)
