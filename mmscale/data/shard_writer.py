"""One shard of a pack, written as one task; a note beside it saves it from being written again."""

import fcntl
import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mmscale.data.grouping import Trait
from mmscale.data.image_checks import RejectedImageError, Treatment, prepare_image
from mmscale.data.index import describe_shard
from mmscale.data.manifest import Shard, parse_shard
from mmscale.data.members import image_id_of
from mmscale.data.sources import Record
from mmscale.errors import DataError
from mmscale.outputs import publish, replace_file


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    folder: Path
    name: str
    settings: str
    treatment: Treatment
    records: tuple[Record, ...]

    @property
    def note(self) -> Path:
        """What a finished shard leaves beside it until the manifest is written."""
        return self.folder / f".{self.name.removesuffix('.tar')}.json"


@dataclass(frozen=True)
class Done:
    """One finished shard; None where every image was rejected."""

    shard: Shard | None
    traits: tuple[Trait, ...]
    rejected: tuple[tuple[str, str], ...]
    kept: bool = False


def write_shard(task: Task) -> Done:
    """Write a shard under another name until it is whole; nothing to do where it is there.

    Raises:
        DataError: Another process is writing it.
    """
    noted = read_done(task)
    if noted and (noted.shard is None or is_sound(task.folder, noted.shard)):
        return noted
    aside, path = task.folder / f".{task.name}.part", task.folder / task.name
    rejected: list[tuple[str, str]] = []
    with _alone(aside) as file:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for record in task.records:
                try:
                    suffix, content = prepare_image(record.image, task.treatment)
                except RejectedImageError as error:
                    rejected.append((record.key, str(error)))
                    continue
                _write_sample(tar, record, suffix, content)
        file.flush()
        os.fsync(file.fileno())
        shard: Shard | None = None
        traits: tuple[Trait, ...] = ()
        if len(rejected) < len(task.records):
            shard, traits = _finish(aside, path)
        else:
            aside.unlink()
            path.unlink(missing_ok=True)
    note = {
        "settings": task.settings,
        "shard": None if shard is None else asdict(shard),
        "traits": [asdict(trait) for trait in traits],
        "rejected": rejected,
    }
    replace_file(task.note, json.dumps(note).encode())
    return Done(shard, traits, tuple(rejected))


def _alone(path: Path) -> IO[bytes]:
    """Open a file for writing that nobody else writes; a killed process leaves no claim on it."""
    while True:
        # Not emptied before it is ours.
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise DataError(
                f"{path}: another process is writing it; wait for that pack to end, or give each "
                "a --part of its own"
            ) from error
        except OSError:
            # A file system without locks: nothing warns of a second pack there.
            break
        try:
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        # The process before gave it its name between our two calls: it is no longer aside.
        file.close()
    file.truncate()
    return file


def _finish(aside: Path, path: Path) -> tuple[Shard, tuple[Trait, ...]]:
    """Give a written shard its name; its record is read back from the file."""
    publish(aside, path)
    described = describe_shard(path)
    assert not described.faults, f"{path} was just written and has {described.faults}"
    return described.shard, described.traits


def _write_sample(tar: tarfile.TarFile, record: Record, suffix: str, image: bytes) -> None:
    image_id = record.image_id
    description = {
        "image_id": image_id_of(record.source, record.key) if image_id is None else image_id,
        "captions": record.captions,
        "source": record.source,
    }
    if record.label is not None:
        description["label"] = record.label
    if record.group is not None:
        description["group"] = record.group
    for ending, content in (
        (suffix, image),
        ("txt", record.captions[0].encode()),
        ("json", json.dumps(description).encode()),
    ):
        member = tarfile.TarInfo(f"{record.key}.{ending}")
        # Whoever packs, and whenever: the same bytes.
        member.size, member.mtime, member.mode = len(content), 0, 0o644
        member.uname = member.gname = "mmscale"
        tar.addfile(member, io.BytesIO(content))


def read_done(task: Task) -> Done | None:
    """What an earlier run, or another part of this pack, noted of a task; None without a note."""
    note = read_note(task)
    if note is None or note.get("settings") != task.settings:
        return None
    try:
        rejected = tuple((str(key), str(reason)) for key, reason in note["rejected"])
        if note["shard"] is None:
            return Done(None, (), rejected, kept=True)
        shard = parse_shard(task.note, 0, note["shard"])
        traits = tuple(Trait.of(fields) for fields in note["traits"])
    except (DataError, KeyError, TypeError, ValueError):
        return None
    return Done(shard, traits, rejected, kept=True) if shard.name == task.name else None


def read_note(task: Task) -> dict[str, Any] | None:
    """What a finished shard left; None where it is not there or cannot be read."""
    try:
        note = json.loads(task.note.read_bytes())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def is_sound(folder: Path, shard: Shard) -> bool:
    """Whether a shard has the bytes that its record says."""
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
