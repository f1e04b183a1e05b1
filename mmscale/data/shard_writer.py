"""One shard of a pack, written as one task; a note beside it saves it from being written again."""

import fcntl
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps

from mmscale.data.damage import reason_of, warnings_named
from mmscale.data.grouping import Trait
from mmscale.data.index import describe_shard, digest_of
from mmscale.data.manifest import Shard, parse_shard
from mmscale.data.members import image_id_of
from mmscale.data.pixels import in_rgb, orientation_of
from mmscale.data.sources import Record
from mmscale.data.sources.cells import ImageCell
from mmscale.errors import DataError
from mmscale.outputs import publish, replace_file

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_QUALITY = 95


@dataclass(frozen=True)
class Treatment:
    """What is done to every image; with neither size nor quality their bytes are kept.

    Attributes:
        resize: Shorter side that larger images are shrunk to, pixels.
        quality: Encode all images anew, JPEG and WebP with this quality; None: only those shrunk.
        max_pixels: Images with more are rejected before they are decoded.
    """

    resize: int | None
    quality: int | None
    max_pixels: int


class RejectedImageError(Exception):
    """Why an image was left out."""


def prepare_image(image: Path | ImageCell, treatment: Treatment) -> tuple[str, bytes]:
    """An image's ending and bytes for a shard: its own, or encoded anew and upright.

    Raises:
        RejectedImageError: It is missing, empty, too large, or cannot be decoded.
    """
    try:
        if isinstance(image, ImageCell):
            content = image.read()
        elif stat.S_ISREG(image.stat().st_mode):
            content = image.read_bytes()
        else:
            raise RejectedImageError("missing file: what has this name is not a file")
    except FileNotFoundError as error:
        raise RejectedImageError("missing file") from error
    except OSError as error:
        raise RejectedImageError(f"unreadable file: {error.strerror}") from error
    if not content:
        raise RejectedImageError("zero bytes")
    with _without_pillow_limit(), warnings_named(str(getattr(image, "file", image))):
        return _treat(content, treatment)


def _treat(content: bytes, treatment: Treatment) -> tuple[str, bytes]:
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Exception as error:
        raise RejectedImageError("undecodable: not a JPEG, PNG or WebP image") from error
    with image:
        # Read from the header: nothing is decoded yet.
        if image.width * image.height > treatment.max_pixels:
            raise RejectedImageError(
                f"more pixels than {treatment.max_pixels}: {image.width} x {image.height}"
            )
        form = str(image.format)
        try:
            image.load()
            if treatment.quality is None and not _is_larger(image, treatment.resize):
                return _SUFFIXES[form], content
            picture = _shrink(_upright(image), treatment.resize)
            return _SUFFIXES[form], _encode(picture, form, treatment.quality or _QUALITY)
        except Exception as error:
            raise RejectedImageError(f"undecodable: {reason_of(error)}") from error


def _is_larger(image: Image.Image, side: int | None) -> bool:
    return side is not None and min(image.size) > side


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if orientation_of(image) in range(2, 9) else image


def _shrink(image: Image.Image, side: int | None) -> Image.Image:
    if side is None or not _is_larger(image, side):
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if image.mode not in ("RGB", "L", "RGBA"):
        image = in_rgb(image)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encode(image: Image.Image, form: str, quality: int) -> bytes:
    file = io.BytesIO()
    if form in ("JPEG", "MPO"):
        image = image if image.mode in ("RGB", "L") else in_rgb(image)
        image.save(file, "JPEG", quality=quality, exif=b"")
    else:
        image.save(file, form, exif=b"", **({"quality": quality} if form == "WEBP" else {}))
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
        return digest_of(file) == (shard.bytes, shard.sha256)
