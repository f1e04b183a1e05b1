"""Files of a data set that hold the same bytes: one image under two names."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mmscale.data.pool import map_ordered
from mmscale.data.sources import Record, Rejection

_TAIL_BYTES = 4096
_CHUNK = 512


def without_copies(
    records: Sequence[Record], workers: int
) -> tuple[tuple[Record, ...], tuple[Rejection, ...]]:
    """Records without those whose image has the bytes of another's; and these, with the reason.

    Of the same bytes in two splits the held-out image stays: what is tested must not be trained on,
    and a benchmark keeps its images. Only files of one size and one end are read whole.
    """
    order = sorted(range(len(records)), key=lambda index: (_rank(records[index].split), index))
    alike = _alike({index: _size(records[index].image) for index in order})
    for look in (_tail, _digest):
        found = _map(look, [records[index].image for index in alike], workers)
        alike = _alike(
            {index: mark + part for (index, mark), part in zip(alike.items(), found, strict=True)}
        )
    originals: dict[bytes, Record] = {}
    copies: dict[int, Rejection] = {}
    for index, mark in alike.items():
        record, original = records[index], originals.setdefault(mark, records[index])
        if original is not record:
            reason = f"duplicate image: has the bytes of {original.key} in {original.split}"
            copies[index] = Rejection(record.key, reason, record.split)
    kept = tuple(record for index, record in enumerate(records) if index not in copies)
    return kept, tuple(copies[index] for index in sorted(copies))


def _rank(split: str) -> int:
    return {"test": 0, "val": 1, "train": 3}.get(split, 2)


def _alike(marks: dict[int, bytes]) -> dict[int, bytes]:
    """Those that have a mark which another has too, in their order."""
    counts = Counter(marks.values())
    return {index: mark for index, mark in marks.items() if mark and counts[mark] > 1}


def _map(look: Callable[[Path], bytes], paths: Sequence[Path], workers: int) -> Iterator[bytes]:
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    for part in map_ordered(partial(_each, look), chunks, min(workers, len(chunks))):
        yield from part


def _each(look: Callable[[Path], bytes], paths: Sequence[Path]) -> list[bytes]:
    return [look(path) for path in paths]


def _size(path: Path) -> bytes:
    """A mark of a file's size; none where there is no file or nothing in it."""
    try:
        status = path.stat()
    except OSError:
        return b""
    return b"%d/" % status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else b""


def _tail(path: Path) -> bytes:
    """A mark of a file's last bytes: the first ones of photographs are much alike."""
    with path.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return hashlib.sha256(file.read()).digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
