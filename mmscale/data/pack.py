"""Packs a source into WebDataset shards with a manifest: checked images, equal bytes every time.

Records are cut into shards before anything is read, each shard is one task, and a finished shard
leaves a note beside it. So the bytes depend on neither the workers nor on where a run was killed.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from webdataset.writer import TarWriter

from mmscale.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    publish,
    read_manifest,
    replace_file,
    write_manifest,
)
from mmscale.data.pool import map_ordered
from mmscale.data.sources import Record, Source, image_id_of, read_source
from mmscale.data.verify import describe_shard
from mmscale.errors import ConfigError, DataError

REJECTED_NAME = "rejected.txt"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
# Changes when the same records would give other bytes.
_BYTES_VERSION = 1


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
    """

    split: str
    folder: Path
    shards: int
    samples: int
    captions: int
    rejected: int
    kept: int


@dataclass(frozen=True)
class _Treatment:
    """What is done to every image.

    Attributes:
        resize: Shorter side of larger images, pixels; None leaves their bytes untouched.
        max_pixels: Images with more are rejected before they are decoded.
    """

    resize: int | None
    max_pixels: int


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    folder: Path
    name: str
    settings: str
    treatment: _Treatment
    records: tuple[Record, ...]

    @property
    def note(self) -> Path:
        """What a finished shard leaves beside it until the manifest is written."""
        return self.folder / f".{self.name.removesuffix('.tar')}.json"


@dataclass(frozen=True)
class _Done:
    """One finished shard; None where every image was rejected."""

    shard: Shard | None
    rejected: tuple[tuple[str, str], ...]
    kept: bool = False


class RejectedImageError(Exception):
    """Why an image was left out."""


def pack(
    source: Path,
    out: Path,
    split: str | None = None,
    samples_per_shard: int = 1000,
    resize: int | None = None,
    max_pixels: int = 89_478_485,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[PackResult]:
    """Pack a data set, one split a folder; goes on where an earlier run was stopped.

    Args:
        source: Folder or recipe of the data set.
        out: Folder of the shards; with `split` itself, else one folder a split inside it.
        split: The only split to pack.
        samples_per_shard: Records cut for each shard; rejected images leave it smaller.
        resize: Shrink images to this shorter side, pixels; others keep their bytes.
        max_pixels: Reject images with more.
        workers: Processes that check and write.
        progress: Called with images done and images in all.

    Raises:
        ConfigError: A number is below 1.
        DataError: Nothing to pack, every image rejected, or `out` holds another pack.
        LaunchError: A worker was killed.
    """
    if samples_per_shard < 1 or max_pixels < 1 or (resize is not None and resize < 1):
        raise ConfigError(
            f"samples_per_shard={samples_per_shard}, resize={resize} and max_pixels={max_pixels} "
            "must be at least 1"
        )
    data = read_source(source)
    splits = _choose(data, Path(source), split)
    total = sum(record.split in splits for record in data.records)
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress:
            progress(done, total)

    treatment = _Treatment(resize, max_pixels)
    out = Path(out)
    return [
        _pack_split(
            data,
            name,
            out if split is not None else out / name,
            treatment,
            samples_per_shard,
            workers,
            advance,
        )
        for name in splits
    ]


def _choose(data: Source, path: Path, split: str | None) -> tuple[str, ...]:
    if not data.splits:
        first = (
            f", first {data.rejected[0].key}: {data.rejected[0].reason}" if data.rejected else ""
        )
        raise DataError(f"{path}: no image has a caption ({len(data.rejected)} rejected{first})")
    if split is None:
        return data.splits
    if split not in data.splits:
        raise DataError(f"{path}: has no split {split}; it has {', '.join(data.splits)}")
    return (split,)


def _pack_split(
    data: Source,
    split: str,
    folder: Path,
    treatment: _Treatment,
    samples_per_shard: int,
    workers: int,
    advance: Callable[[int], None],
) -> PackResult:
    records = [record for record in data.records if record.split == split]
    refused = [(r.key, r.reason) for r in data.rejected if r.split in (split, None)]
    settings = _settings(split, treatment, samples_per_shard, records, refused)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        _Task(
            folder,
            f"{split}-{start // samples_per_shard:06d}.tar",
            settings,
            treatment,
            tuple(records[start : start + samples_per_shard]),
        )
        for start in range(0, len(records), samples_per_shard)
    ]
    finished = _finished(folder, settings)
    if finished is None:
        _check_folder(folder, tasks)
        finished, rejected, kept = _write_all(data.name, split, tasks, refused, workers, advance)
    else:
        advance(len(records))
        rejected, kept = _count_rejected(folder), len(finished.shards)
    for task in tasks:
        task.note.unlink(missing_ok=True)
    return PackResult(
        split, folder, len(finished.shards), finished.samples, finished.captions, rejected, kept
    )


def _write_all(
    source: str,
    split: str,
    tasks: list[_Task],
    refused: list[tuple[str, str]],
    workers: int,
    advance: Callable[[int], None],
) -> tuple[Manifest, int, int]:
    """Write what is not there yet, then the list of rejected images, then the manifest."""
    folder = tasks[0].folder
    shards, rejected, kept = [], list(refused), 0
    for task, done in zip(tasks, map_ordered(_write_shard, tasks, workers), strict=True):
        if done.shard is not None:
            shards.append(done.shard)
        rejected += done.rejected
        kept += done.kept
        advance(len(task.records))
    lines = "".join(f"{key}\t{' '.join(reason.split())}\n" for key, reason in rejected)
    if rejected:
        replace_file(folder / REJECTED_NAME, lines.encode())
    else:
        (folder / REJECTED_NAME).unlink(missing_ok=True)
    if not shards:
        for task in tasks:
            task.note.unlink()
        key, reason = rejected[0]
        raise DataError(
            f"{folder}: nothing was packed: all {len(rejected)} images were rejected, "
            f"first {key}: {reason}; see {REJECTED_NAME}"
        )
    manifest = Manifest(split, source, tuple(shards), tasks[0].settings)
    write_manifest(folder, manifest)
    return manifest, len(rejected), kept


# --- What is already there ---


def _settings(
    split: str,
    treatment: _Treatment,
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


def _finished(folder: Path, settings: str) -> Manifest | None:
    """The manifest of a folder that needs no work; None where it does."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.settings != settings:
        raise DataError(
            f"{folder}: was packed from other data or with other settings; remove it, or pack into "
            "another folder"
        )
    if all(_is_sound(folder, shard) for shard in manifest.shards):
        return manifest
    (folder / MANIFEST_NAME).unlink()
    return None


def _is_sound(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _check_folder(folder: Path, tasks: list[_Task]) -> None:
    """Refuse to mix this pack's shards with others."""
    ours = {task.name for task in tasks}
    if other := next((p for p in sorted(folder.glob("*.tar")) if p.name not in ours), None):
        raise DataError(
            f"{other}: is not of this pack, which writes {tasks[0].name} to {tasks[-1].name}; "
            "remove it, or pack into another folder"
        )
    for task in tasks:
        note = _read_note(task)
        if note is not None and note.get("settings") != task.settings:
            raise DataError(
                f"{task.note}: a pack from other data or with other settings was begun here; "
                f"remove {folder}, or pack into another folder"
            )


def _count_rejected(folder: Path) -> int:
    path = folder / REJECTED_NAME
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _read_note(task: _Task) -> dict[str, Any] | None:
    try:
        note = json.loads(task.note.read_bytes())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _kept(task: _Task) -> _Done | None:
    """What an earlier run made of this task, if it is still whole."""
    note = _read_note(task)
    if note is None or note.get("settings") != task.settings:
        return None
    try:
        rejected = tuple((str(key), str(reason)) for key, reason in note["rejected"])
        if note["shard"] is None:
            return _Done(None, rejected, kept=True)
        fields = note["shard"]
        lists = {name: tuple(fields[name]) for name in ("offsets", "captions")}
        shard = Shard(**{**fields, **lists})
        sound = shard.name == task.name and _is_sound(task.folder, shard)
    except (KeyError, TypeError, ValueError):
        return None
    return _Done(shard, rejected, kept=True) if sound else None


# --- One shard ---


def _write_shard(task: _Task) -> _Done:
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
    return _Done(shard, tuple(rejected))


def _finish(task: _Task, aside: Path, path: Path) -> Shard:
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


# --- One image ---


def prepare_image(path: Path, treatment: _Treatment) -> tuple[str, bytes]:
    """An image's ending and bytes for a shard: its own, or turned upright and shrunk.

    Raises:
        RejectedImageError: It is missing, empty, too large, or cannot be decoded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RejectedImageError(f"cannot be read ({error.strerror})") from error
    if not content:
        raise RejectedImageError("has zero bytes")
    with _without_pillow_limit():
        return _treat(content, treatment)


def _treat(content: bytes, treatment: _Treatment) -> tuple[str, bytes]:
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Exception as error:
        raise RejectedImageError("is not a JPEG, PNG or WebP image") from error
    with image:
        # Read from the header: nothing is decoded yet.
        if image.width * image.height > treatment.max_pixels:
            raise RejectedImageError(
                f"has {image.width} x {image.height} pixels, more than {treatment.max_pixels}"
            )
        form = str(image.format)
        try:
            image.load()
            upright = _upright(image)
            shrunk = _shrink(upright, treatment.resize)
            if shrunk is image:
                return _SUFFIXES[form], content
            return _SUFFIXES[form], _encode(shrunk, form)
        except Exception as error:
            raise RejectedImageError(f"cannot be decoded ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    orientation = 1
    # A picture with a damaged tag block is shown as it lies.
    with suppress(Exception):
        orientation = image.getexif().get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _shrink(image: Image.Image, side: int | None) -> Image.Image:
    if side is None or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if image.mode not in ("RGB", "L", "RGBA"):
        image = image.convert("RGB")
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encode(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    if form in ("JPEG", "MPO"):
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image.save(file, "JPEG", quality=95, exif=b"")
    else:
        image.save(file, form, exif=b"", **({"quality": 95} if form == "WEBP" else {}))
    return file.getvalue()


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own limit on pixels, so that `max_pixels` alone decides."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
