"""What a folder holds of an earlier pack, and whether a pack may go on there."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from mmscale.data.image_checks import Treatment
from mmscale.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from mmscale.data.shard_writer import Task, is_sound, read_note
from mmscale.data.sources import Record
from mmscale.durable import replace_file
from mmscale.errors import DataError

REJECTED_NAME = "rejected.txt"
# Changes when the same records would give other bytes.
_BYTES_VERSION = 1


def settings_digest(
    split: str,
    treatment: Treatment,
    samples_per_shard: int,
    records: list[Record],
    refused: list[tuple[str, str]],
) -> str:
    """Digest of all that decides the bytes of a split's shards."""
    digest = hashlib.sha256()
    plan = (_BYTES_VERSION, split, asdict(treatment), samples_per_shard, refused)
    digest.update(json.dumps(plan).encode())
    for record in records:
        try:
            size = record.image.stat().st_size
        except OSError:
            size = -1
        file = (record.image.name, size)
        fields = (record.key, record.captions, record.source, record.image_id, record.label, file)
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def finished_manifest(folder: Path, settings: str) -> Manifest | None:
    """The manifest of a folder that needs no work; None where it does."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.settings != settings:
        raise DataError(
            f"{folder}: was packed from other data or with other settings; remove it, or pack into "
            "another folder"
        )
    if all(is_sound(folder, shard) for shard in manifest.shards):
        return manifest
    (folder / MANIFEST_NAME).unlink()
    return None


def require_own_folder(folder: Path, tasks: list[Task]) -> None:
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
    """List the images that were left out, one a line; no file where there are none."""
    lines = "".join(f"{key}\t{' '.join(reason.split())}\n" for key, reason in rejected)
    if rejected:
        replace_file(folder / REJECTED_NAME, lines.encode())
    else:
        (folder / REJECTED_NAME).unlink(missing_ok=True)


def count_rejected(folder: Path) -> int:
    """Images that an earlier run left out."""
    path = folder / REJECTED_NAME
    return path.read_bytes().count(b"\n") if path.is_file() else 0
