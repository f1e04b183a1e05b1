"""What a folder holds of an earlier pack, and whether a pack may go on there."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmscale.data.image_checks import Treatment
from mmscale.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from mmscale.data.shard_writer import Task, is_sound, read_note
from mmscale.data.sources import Record
from mmscale.durable import replace_file
from mmscale.errors import DataError, printable

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
        try:
            size = record.image.stat().st_size
        except OSError:
            size = -1
        file = (record.image.name, size)
        fields = (record.key, record.captions, record.source, record.image_id, record.label, file)
        digest.update(json.dumps(fields).encode())
        if record.group is not None:
            digest.update(json.dumps(record.group).encode())
    return digest.hexdigest()


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


def sweep(folder: Path, tasks: Sequence[Task]) -> None:
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
