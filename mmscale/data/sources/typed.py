"""Tables whose cells have types: Parquet, JSON lines, and Hugging Face data sets.

An image is a file name, or lies in the table itself; then it stays there until it is packed.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mmscale.config.data import ColumnsConfig
from mmscale.data.sources.cells import (
    ImageCell,
    content_of,
    needs,
    parquet_file,
    rows_of_arrow,
    rows_of_parquet,
)
from mmscale.data.sources.columns import Columns, choose_columns
from mmscale.data.sources.records import Entry, Listing, Rejection, read_lines
from mmscale.data.sources.table import open_cells, take
from mmscale.errors import DataError, gist

HUB = "hf:"
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test")


@dataclass(frozen=True)
class _Part:
    """One file of a table, and how it is read.

    Attributes:
        file: Where it lies.
        split: Of all its rows, unless a column says otherwise; None where nothing tells.
        rows: Group, row in it and fields of every row, given the columns of interest.
        names: Its columns.
        encoded: Those of them that hold images.
        classes: For a column of numbers that stand for names, these.
    """

    file: Path
    split: str | None
    rows: Callable[[Path, list[str]], Iterator[tuple[int, int, dict[str, Any]]]]
    names: tuple[str, ...]
    encoded: frozenset[str]
    classes: Mapping[str, Sequence[str]]


def split_named(name: str) -> str | None:
    """The split that a file's or folder's name tells: `train-00000-of-00002`, `validation`."""
    first = name.partition(".")[0].partition("-")[0].lower()
    return first if first in _SPLITS else None


def read_parquet(files: Sequence[Path], source: str, asked: ColumnsConfig | None) -> Listing:
    """Parquet files as one table; their names may tell splits, as the Hub's do.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: A file cannot be read, or lacks a column.
    """
    told = {file: split_named(file.name) or split_named(file.parent.name) for file in files}
    known = all(told.values()) and len(set(told.values())) > 1
    parts = []
    for file in files:
        schema = parquet_file(file).schema_arrow
        split = told[file] if known else None
        parts.append(_part(file, split, rows_of_parquet, schema, {}))
    return _listing(parts, source, asked)


def read_saved(folder: Path, source: str, asked: ColumnsConfig | None) -> Listing:
    """A folder that `save_to_disk` of datasets wrote.

    Raises:
        ConfigError: datasets is not installed.
        DataError: It cannot be read.
    """
    library = needs(folder, "datasets")
    return _of_library(folder, lambda: library.load_from_disk(str(folder)), source, asked)


def read_hub(address: str, asked: ColumnsConfig | None) -> Listing:
    """A data set of the Hub, `hf:ORG/NAME[:CONFIG][@REVISION]`, or a folder like one.

    Raises:
        ConfigError: datasets is not installed.
        DataError: There is none, it needs a script, or it cannot be fetched.
    """
    library = needs(address, "datasets")
    name, config, revision = hub_parts(address)
    is_folder = Path(name).is_dir()

    def load() -> Any:
        return library.load_dataset(name, config, revision=None if is_folder else revision)

    return _of_library(address, load, Path(name).resolve().name if is_folder else name, asked)


def hub_parts(address: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and revision of `hf:ORG/NAME[:CONFIG][@REVISION]`."""
    rest, _, revision = address.removeprefix(HUB).partition("@")
    name, _, config = rest.partition(":")
    return name, config or None, revision or None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    names = ("dataset_dict.json", "state.json")
    return any((folder / name).is_file() for name in names)


def _of_library(
    where: object, load: Callable[[], Any], source: str, asked: ColumnsConfig | None
) -> Listing:
    try:
        found = load()
    except Exception as error:
        raise DataError(
            f"{where}: datasets cannot load it ({gist(error)}); check its name, its configuration "
            f"({HUB}ORG/NAME:CONFIG@REVISION) and HF_TOKEN, HF_HUB_OFFLINE"
        ) from error
    # A single `train` is what a set without splits is called.
    several = isinstance(found, dict) and set(found) != {"train"}
    parts = []
    for split, rows in found.items() if isinstance(found, dict) else [("train", found)]:
        classes = {n: f.names for n, f in rows.features.items() if hasattr(f, "names")}
        for file in (Path(one["filename"]) for one in rows.cache_files):
            own = str(split) if several else None
            parts.append(_part(file, own, rows_of_arrow, rows.data.schema, classes))
    return _listing(parts, source, asked)


def _part(
    file: Path,
    split: str | None,
    rows: Callable[[Path, list[str]], Iterator[tuple[int, int, dict[str, Any]]]],
    schema: Any,
    classes: Mapping[str, Sequence[str]],
) -> _Part:
    return _Part(file, split, rows, tuple(schema.names), encoded_in(schema), classes)


def encoded_in(schema: Any) -> frozenset[str]:
    """Columns of an Arrow schema that hold images."""
    return frozenset(field.name for field in schema if _may_be_image(field))


def _may_be_image(field: Any) -> bool:
    """Whether a column holds bytes, or the Hub's `{bytes, path}`."""
    kind = str(field.type)
    return kind.startswith(("binary", "large_binary", "struct<bytes: binary"))


def _listing(parts: Sequence[_Part], source: str, asked: ColumnsConfig | None) -> Listing:
    if not parts:
        raise DataError(f"{source}: holds no rows; check the source")
    listing = Listing(parts[0].file, source, [])
    entries: dict[Hashable, Entry] = {}
    number = 0
    for part in parts:
        columns = choose_columns(part.file, part.names, asked, part.encoded)
        if columns.note and not listing.notes:
            listing.notes.append(columns.note)
        for group, row, fields in part.rows(part.file, columns.read):
            _take_row(entries, part, columns, (group, row, number), fields)
            number += 1
    listing.entries = list(entries.values())
    listing.notes += _told_apart(listing.entries)
    open_cells(listing)
    return listing


def _take_row(
    entries: dict[Hashable, Entry],
    part: _Part,
    columns: Columns,
    place: tuple[int, int, int],
    fields: dict[str, Any],
) -> None:
    group, row, number = place
    value, content = fields[columns.image], content_of(fields[columns.image])
    for column, names in part.classes.items():
        if isinstance(fields.get(column), int) and 0 <= fields[column] < len(names):
            fields[column] = names[fields[column]]
    path = value.get("path") if isinstance(value, dict) else value
    name = path if isinstance(path, str) else None
    image: Hashable
    if content is None:
        new, image = Entry(name or "", split=part.split), name or ""
    else:
        given = fields[columns.name] if columns.name else name
        digest = hashlib.sha256(content).digest()
        # Without a name rows of one image are known by its bytes.
        image = (given or "", digest)
        called = str(given) if given not in (None, "") else f"{number:09d}"
        cell = ImageCell(
            part.file, group, row, columns.image, PurePosixPath(called).name, len(content), digest
        )
        new = Entry(called, split=part.split, cell=cell)
    take(entries, image, new, columns, fields, f"{part.file}: row {number}")


def _told_apart(entries: list[Entry]) -> list[str]:
    """Give images of one name and other bytes names of their own."""
    seen: set[str] = set()
    renamed = 0
    for entry in entries:
        if entry.cell is not None and entry.name in seen:
            path = PurePosixPath(entry.name)
            name = f"{path.stem}-{entry.cell.digest.hex()[:8]}{path.suffix}"
            entry.name, entry.cell = str(path.with_name(name)), replace(entry.cell, name=name)
            renamed += 1
        seen.add(entry.name)
    if not renamed:
        return []
    return [f"{renamed:,} images have the name of another and other bytes; each counts as its own"]


def read_json_lines(file: Path, asked: ColumnsConfig | None) -> Listing:
    """A file with a JSON object a line, such as the Hub's `metadata.jsonl`.

    Raises:
        DataError: A line is no object, or a column is not there.
    """
    listing = Listing(file, file.resolve().parent.name, [])
    entries: dict[Hashable, Entry] = {}
    columns: Columns | None = None
    for where, line in read_lines(file):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            listing.faults.append(Rejection(where, "is not a JSON object"))
            continue
        if columns is None:
            columns = choose_columns(file, list(fields), asked)
            listing.notes += [columns.note] if columns.note else []
        name = fields.get(columns.image)
        if not isinstance(name, str) or columns.caption not in fields:
            listing.faults.append(Rejection(where, "has no image or no caption"))
            continue
        take(entries, name, Entry(name), columns, fields, f"{file}: {where}")
    listing.entries = list(entries.values())
    open_cells(listing)
    return listing


def parquet_in(folder: Path) -> list[Path]:
    """Parquet files of a folder, and of those in it, as a repository of the Hub lays them."""
    inner: Iterable[Path] = sorted(path for path in folder.iterdir() if path.is_dir())
    places = [folder, *(path for path in inner if not path.name.startswith("."))]
    return [file for place in places for file in sorted(place.glob("*.parquet"))]
