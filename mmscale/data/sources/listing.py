"""What one caption file says, and the reading of text and JSON that its readers share."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale.data.sources.records import Rejection
from mmscale.errors import DataError

IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k-images",
    "flickr30k_images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    ".",
)


@dataclass
class Entry:
    """An image as a caption file describes it."""

    name: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None
    image_id: int | None = None
    label: int | None = None


@dataclass
class Listing:
    """What one caption file says."""

    file: Path
    source: str
    entries: list[Entry]
    faults: list[Rejection] = field(default_factory=list)
    image_folders: tuple[str, ...] = IMAGE_FOLDERS


def read_lines(file: Path) -> Iterator[tuple[str, str | None]]:
    """Each line with its place; None where it is not UTF-8."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); download it again") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().rstrip("\r")
        except UnicodeDecodeError:
            yield f"{file.name}:{number}", None
            continue
        if text.strip():
            yield f"{file.name}:{number}", text


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file with a list of images."""
    try:
        content = file.read_bytes()
        parsed = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("images"), list):
        raise DataError(f'{file}: has no list "images"; it is not a caption file')
    return parsed


def number_of(value: Any) -> int | None:
    """A number in [0, 2^63), also one written as text; None where it is anything else."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,19}", value):
        value = int(value)
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if sound else None
