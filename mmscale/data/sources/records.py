"""What `read_source` gives: the images of a data set with their captions, and what was left out.

And what its readers share: caption files as text, names, and the share held out for evaluation.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmscale.data.sources.cells import ImageCell
from mmscale.errors import ConfigError, DataError


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
        key: Its name in a shard: no dot, no slash, no blank.
        image: The image file, or the cell of a table that holds it; not looked at yet.
        captions: At least one, none empty.
        split: `train`, `val`, `test`, or a name of the source's own.
        source: Name of the data set.
        image_id: The source's own identity of the image, where it has one.
        label: Class of the image, where it has one: a number, or a name as a source gives it.
        group: Name of the group of images that it counts as one with, where it has one.
    """

    key: str
    image: Path | ImageCell
    captions: tuple[str, ...]
    split: str
    source: str
    image_id: int | None = None
    label: int | str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Rejection:
    """An image or caption that was left out; `split` is None where nothing tells it."""

    key: str
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set that was read.

    Attributes:
        name: Its name.
        described_by: The files that the captions came from.
        records: Its images in the order of those files.
        rejected: What was left out, and why.
        classes: Names of the labels' numbers, where the labels had names.
        notes: What a person should know about how it was read, a line each.
        tells_splits: Whether anything said of which split an image is.
        place: What was read, for messages.
    """

    name: str
    described_by: tuple[Path, ...]
    records: tuple[Record, ...]
    rejected: tuple[Rejection, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tells_splits: bool = False
    place: Path = Path()

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have records: train, val, test, then others by name."""
        usual = ("train", "val", "test")
        found = {record.split for record in self.records}
        return (*(s for s in usual if s in found), *sorted(found.difference(usual)))


PICTURE = re.compile(r".+\.(?:jpe?g|png|webp)", re.IGNORECASE)


def stem_of(name: str) -> str:
    """The name without the ending of an image: split lists leave it out as they like."""
    return re.sub(r"\.(?:jpe?g|png|webp)$", "", name, flags=re.IGNORECASE)


def key_of(name: str) -> str:
    """What an image is called in a shard."""
    # Readers split at the first dot, lists at blanks.
    return re.sub(r"[./\\\s\x00-\x1f\x7f\ud800-\udfff]", "_", stem_of(name))


def is_inside(name: str) -> bool:
    """Whether a file name stays in its folder."""
    return (
        bool(name)
        and "\0" not in name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
    )


IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k-images",
    "flickr30k_images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    ".",
)
# The longer first: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# No caption file of the field comes near.
_UNPACKED_BYTES = 2**30


@dataclass
class Entry:
    """An image as a caption file describes it; its captions may be anything yet."""

    name: str
    captions: list[Any] = field(default_factory=list)
    split: str | None = None
    image_id: int | None = None
    label: int | str | None = None
    group: str | None = None
    cell: ImageCell | None = None


@dataclass
class Listing:
    """What one caption file says."""

    file: Path
    source: str
    entries: list[Entry]
    faults: list[Rejection] = field(default_factory=list)
    image_folders: tuple[str, ...] = IMAGE_FOLDERS
    notes: list[str] = field(default_factory=list)
    cells: str = "cell"


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Each line with its place; bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: It cannot be read.
    """
    content = _as_utf8(file, _read(file))
    for number, line in enumerate(content.split(b"\n"), start=1):
        text = line.decode(errors="surrogateescape").rstrip("\r")
        if text.strip():
            yield f"{file.name}:{number}", text


def _as_utf8(file: Path, content: bytes) -> bytes:
    """A text whose first bytes may say, or show, that it is UTF-16 or UTF-32."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    if encoding is None and (odd := _has_every_other_zero(content)) is not None:
        encoding = "utf-16-le" if odd else "utf-16-be"
    if encoding is None:
        return content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode(encoding).encode()
    except UnicodeError as error:
        raise DataError(f"{file}: is not whole {encoding} ({error}); save it as UTF-8") from error


def _has_every_other_zero(content: bytes) -> bool | None:
    """Whether it is Latin text of two bytes a letter, and the second of them is zero."""
    even, odd = content[:200:2], content[1:200:2]
    if len(odd) < 8 or bool(even.count(0) > 0.8 * len(even)) == bool(odd.count(0) > 0.8 * len(odd)):
        return None
    return odd.count(0) > even.count(0)


def _read(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise DataError(f"{file}: is not a file; name one that holds captions or a split")
        if file.suffix != ".gz":
            return file.read_bytes()
        with gzip.open(file) as unpacked:
            content = unpacked.read(_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); download it again") from error
    if len(content) > _UNPACKED_BYTES:
        raise DataError(
            f"{file}: unpacks to more than {_UNPACKED_BYTES:,} bytes; unpack it if you trust it"
        )
    return content


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file with a list of images."""
    content = _read(file)
    try:
        # A caption that is not UTF-8 costs that caption, not the file.
        text = content.decode(json.detect_encoding(content), errors="surrogateescape")
        parsed = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("images"), list):
        raise DataError(f'{file}: has no list "images"; it is not a caption file')
    return parsed


def label_of(value: Any) -> int | str | None:
    """A class: a number, or a name; None where it is neither."""
    number = number_of(value)
    return name_of(value) if number is None else number


def name_of(value: Any) -> str | None:
    """A name, also one written as a number; None where it is blank or anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def number_of(value: Any) -> int | None:
    """A number in [0, 2^63), also one written as text; None where it is anything else."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,19}", value):
        value = int(value)
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if sound else None


def held_out(data: Source, share: float) -> Source:
    """The same data set with `share` of its images in `val` and the others in `train`.

    Which ones follows from their keys alone, so that it is the same every time; images of one
    group stay together.

    Raises:
        ConfigError: It tells its splits itself, or the share is none.
        DataError: Nothing would be left on one side.
    """
    if not 0 < share < 1:
        raise ConfigError(f"hold_out={share:g} is not a share; give one between 0 and 1, as 0.1")
    if data.tells_splits:
        raise ConfigError(
            f"hold_out={share:g}: {data.name} says itself what is {', '.join(data.splits)}; leave "
            "--hold-out away"
        )
    names = sorted({_unit_of(record) for record in data.records}, key=_drawn)
    chosen = set(names[: round(share * len(names))])
    if not chosen or len(chosen) == len(names):
        raise DataError(
            f"hold_out={share:g} of {len(names):,} images leaves nothing on one side; give another "
            "share"
        )
    records = tuple(
        replace(record, split="val" if _unit_of(record) in chosen else "train")
        for record in data.records
    )
    held = sum(record.split == "val" for record in records)
    # That nothing tells of splits is no news any more.
    notes = tuple(note for note in data.notes if "no split is known" not in note)
    line = f"{held:,} of {len(records):,} images are held out as val, chosen by their names"
    return replace(data, records=records, notes=(*notes, line))


def _unit_of(record: Record) -> str:
    return f"group {record.group}" if record.group is not None else record.key


def _drawn(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), person=b"hold-out").digest()
