"""One shard of a pack, written as one task; a note beside it saves it from being written again."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from mmscale.data.image_checks import RejectedImageError, Treatment, prepare_image
from mmscale.data.manifest import Shard
from mmscale.data.members import image_id_of
from mmscale.data.sources import Record
from mmscale.data.verify import describe_shard
from mmscale.durable import publish, replace_file


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
    rejected: tuple[tuple[str, str], ...]
    kept: bool = False


def write_shard(task: Task) -> Done:
    """Write a shard under another name until it is whole; nothing to do where it is there."""
    if kept := _kept(task):
        return kept
    aside, path = task.folder / f".{task.name}.part", task.folder / task.name
    rejected: list[tuple[str, str]] = []
    with aside.open("wb") as file:
        with TarWriter(
            file, user="mmscale", group="mmscale", mode=0o644, encoder=False, mtime=0
        ) as tar:
            for record in task.records:
                try:
                    suffix, content = prepare_image(record.image, task.treatment)
                except RejectedImageError as error:
                    rejected.append((record.key, str(error)))
                    continue
                _write_sample(tar, record, suffix, content)
        file.flush()
        os.fsync(file.fileno())
    shard = _finish(task, aside, path) if len(rejected) < len(task.records) else None
    if shard is None:
        aside.unlink()
        path.unlink(missing_ok=True)
    note = {
        "settings": task.settings,
        "shard": None if shard is None else asdict(shard),
        "rejected": rejected,
    }
    replace_file(task.note, json.dumps(note).encode())
    return Done(shard, tuple(rejected))


def _finish(task: Task, aside: Path, path: Path) -> Shard:
    """Give a written shard its name; its record is read back from the file."""
    publish(aside, path)
    shard, faults = describe_shard(path)
    assert not faults, f"{path} was just written and has {faults}"
    return shard


def _write_sample(tar: TarWriter, record: Record, suffix: str, image: bytes) -> None:
    image_id = record.image_id
    description = {
        "image_id": image_id_of(record.source, record.key) if image_id is None else image_id,
        "captions": record.captions,
        "source": record.source,
    }
    if record.label is not None:
        description["label"] = record.label
    # TarWriter sorts the members of one call; image, text and description shall be in this order.
    for ending, content in (
        (suffix, image),
        ("txt", record.captions[0].encode()),
        ("json", json.dumps(description).encode()),
    ):
        tar.write({"__key__": record.key, ending: content})


def _kept(task: Task) -> Done | None:
    """What an earlier run made of this task, if it is still whole."""
    note = read_note(task)
    if note is None or note.get("settings") != task.settings:
        return None
    try:
        rejected = tuple((str(key), str(reason)) for key, reason in note["rejected"])
        if note["shard"] is None:
            return Done(None, rejected, kept=True)
        fields = note["shard"]
        lists = {name: tuple(fields[name]) for name in ("offsets", "captions")}
        shard = Shard(**{**fields, **lists})
        sound = shard.name == task.name and is_sound(task.folder, shard)
    except (KeyError, TypeError, ValueError):
        return None
    return Done(shard, rejected, kept=True) if sound else None


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
