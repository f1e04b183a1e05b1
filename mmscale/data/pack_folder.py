"""What a pack was asked for, what its folder holds of an earlier one, and what came of it."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from mmscale.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from mmscale.data.pool import map_ordered
from mmscale.data.shard_writer import Task, Treatment, is_sound, read_note
from mmscale.data.sources import Record, Rejection
from mmscale.data.sources.cells import ImageCell
from mmscale.errors import ConfigError, DataError, printable
from mmscale.outputs import replace_file

REJECTED_NAME = "rejected.txt"
# Each changes when the same records would give other bytes: as they are, and shrunk.
_BYTES_VERSION, _SHRUNK_VERSION = 2, 3


def settings_digest(
    split: str,
    treatment: Treatment,
    samples_per_shard: int,
    records: list[Record],
    refused: list[tuple[str, str]],
) -> str:
    """Digest of all that decides the bytes of a split's shards."""
    digest = hashlib.sha256()
    version = _BYTES_VERSION if treatment.resize is None else _SHRUNK_VERSION
    plan = (version, split, asdict(treatment), samples_per_shard, refused)
    digest.update(json.dumps(plan).encode())
    for record in records:
        size = _bytes_of(record.image)
        file = (record.image.name, size)
        fields = (record.key, record.captions, record.source, record.image_id, record.label, file)
        digest.update(json.dumps(fields).encode())
        if record.group is not None:
            digest.update(json.dumps(record.group).encode())
    return digest.hexdigest()


def _bytes_of(image: Path | ImageCell) -> int:
    """How large an encoded image is; -1 where there is none."""
    if isinstance(image, ImageCell):
        return image.size
    try:
        return image.stat().st_size
    except OSError:
        return -1


def finished_manifest(folder: Path, settings: str, trust: bool = False) -> Manifest | None:
    """The manifest of a folder that needs no work; None where it does.

    Args:
        folder: What was packed into.
        settings: What the pack was asked for.
        trust: The shards were checked a moment ago.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.settings != settings:
        raise DataError(
            f"{folder}: was packed from other data or with other settings; remove it, or pack into "
            "another folder"
        )
    if trust or all(is_sound(folder, shard) for shard in manifest.shards):
        return manifest
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    return None


def require_own_folder(folder: Path, tasks: Sequence[Task]) -> None:
    """Refuse to mix this pack's shards with others."""
    ours = {task.name for task in tasks}
    if other := next((p for p in sorted(folder.glob("*.tar")) if p.name not in ours), None):
        raise DataError(
            f"{other}: is not of this pack, which writes {tasks[0].name} to {tasks[-1].name}; "
            "remove it, or pack into another folder"
        )
    for task in tasks:
        note = read_note(task)
        if note is not None and note.get("settings") != task.settings:
            raise DataError(
                f"{task.note}: a pack from other data or with other settings was begun here; "
                f"remove {folder}, or pack into another folder"
            )


def write_rejected(folder: Path, rejected: list[tuple[str, str]]) -> None:
    """List what was left out, one a line; no file where there is nothing."""
    lines = "".join(f"{_line(key)}\t{_line(reason)}\n" for key, reason in rejected)
    if rejected:
        replace_file(folder / REJECTED_NAME, lines.encode("utf-8", "backslashreplace"))
    else:
        (folder / REJECTED_NAME).unlink(missing_ok=True)


def clean_folder(folder: Path, tasks: Sequence[Task]) -> None:
    """Remove what a finished pack needs no more, and what killed processes left."""
    for task in tasks:
        task.note.unlink(missing_ok=True)
    for left in (*folder.glob("..*.json.*.part"), *folder.glob(".rejected.txt.*.part")):
        left.unlink(missing_ok=True)


def _line(text: str) -> str:
    """A text from a source on one line, with nothing in it that could steer a terminal."""
    return printable(" ".join(text.split()))


def read_reasons(folder: Path) -> Counter[str]:
    """How often each reason stands in the list of rejected images."""
    path = folder / REJECTED_NAME
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return Counter(line.partition("\t")[2].partition(":")[0] for line in lines)


@dataclass(frozen=True)
class PackPart:
    """Which shards of a pack this process writes: number `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "PackPart":
        """From `2/8`.

        Raises:
            ConfigError: It is no part.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise ConfigError(f"part={text} is not a part of a whole; write 1/8 to 8/8 for eight parts")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class PackResult:
    """One split that was packed.

    Attributes:
        split: Its name.
        folder: Where its shards and manifest are.
        shards: Tars.
        samples: Images in them.
        captions: Captions in them.
        rejected: Lines of `rejected.txt`.
        kept: Shards that an earlier run had finished.
        reasons: How many lines give each reason.
        missing: Shards that other parts have not finished; without them there is no manifest yet.
    """

    split: str
    folder: Path
    shards: int
    samples: int
    captions: int
    rejected: int
    kept: int
    reasons: tuple[tuple[str, int], ...] = ()
    missing: int = 0

    def __str__(self) -> str:
        notes = []
        if self.rejected:
            which = "".join(f", {count:,} {reason}" for reason, count in self.reasons)
            notes.append(f"{self.rejected:,} rejected{which}: see {REJECTED_NAME}")
        if self.kept:
            notes.append(f"{_counted(self.kept, 'shard')} of an earlier run kept")
        if self.missing:
            notes.append(
                f"other parts have {_counted(self.missing, 'shard')} to write; the last one writes "
                "the manifest"
            )
        remarks = f" ({'; '.join(notes)})" if notes else ""
        return (
            f"{self.split}: {_counted(self.samples, 'image')}, "
            f"{_counted(self.captions, 'caption')} in {_counted(self.shards, 'shard')} "
            f"at {self.folder}{remarks}"
        )


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


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


def _map(
    look: Callable[[Path | ImageCell], bytes], paths: Sequence[Path | ImageCell], workers: int
) -> Iterator[bytes]:
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    for part in map_ordered(partial(_each, look), chunks, min(workers, len(chunks))):
        yield from part


def _each(
    look: Callable[[Path | ImageCell], bytes], paths: Sequence[Path | ImageCell]
) -> list[bytes]:
    return [look(path) for path in paths]


def _size(path: Path | ImageCell) -> bytes:
    """A mark of an image's size; none where there is no file or nothing in it."""
    if isinstance(path, ImageCell):
        return b"%d/" % path.size
    try:
        status = path.stat()
    except OSError:
        return b""
    return b"%d/" % status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else b""


def _tail(path: Path | ImageCell) -> bytes:
    """A mark of an image's last bytes: the first ones of photographs are much alike."""
    if isinstance(path, ImageCell):
        return path.digest
    with path.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return hashlib.sha256(file.read()).digest()


def _digest(path: Path | ImageCell) -> bytes:
    if isinstance(path, ImageCell):
        return path.digest
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
