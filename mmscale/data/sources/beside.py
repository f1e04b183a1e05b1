"""Folders of images: with a `.txt` beside each, or with the Hub's `metadata` in them."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mmscale.config.data import ColumnsConfig
from mmscale.data.sources.records import (
    PICTURE,
    Entry,
    Listing,
    Rejection,
    key_of,
    stem_of,
)
from mmscale.data.sources.table import open_cells, read_table
from mmscale.data.sources.typed import read_json_lines, read_parquet, split_named

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def has_texts_beside(folder: Path) -> bool:
    """Whether some image below a folder has a text of its own."""
    return any(
        stem_of(name) + ".txt" in names
        for _, names in _walk(folder)
        for name in names
        if PICTURE.fullmatch(name)
    )


def read_texts_beside(folder: Path) -> Listing:
    """Images at any depth, each with its captions in the `.txt` of its name.

    Their first folders are splits where all of them have a split's name.
    """
    listing = Listing(folder / "*.txt", folder.resolve().name, [], cells="txt")
    for place, names in _walk(folder):
        present = set(names)
        for name in filter(PICTURE.fullmatch, names):
            within = (place / name).relative_to(folder).as_posix()
            if (text := stem_of(name) + ".txt") not in present:
                listing.faults.append(Rejection(key_of(within), "no caption: no .txt beside it"))
                continue
            content = (place / text).read_bytes().decode("utf-8-sig", errors="surrogateescape")
            listing.entries.append(Entry(within, [content]))
    first = [split_named(entry.name.partition("/")[0]) for entry in listing.entries]
    nested = all("/" in entry.name for entry in listing.entries)
    if nested and all(first):
        for entry, split in zip(listing.entries, first, strict=True):
            entry.split = split
    open_cells(listing)
    return listing


def metadata_in(folder: Path) -> list[Path]:
    """The Hub's `metadata` of a folder, or of the folders in it, a split each."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    for places in ([folder], inner):
        found = [
            next((place / name for name in _METADATA if (place / name).is_file()), None)
            for place in places
        ]
        if any(found):
            return [file for file in found if file is not None]
    return []


def read_metadata(folder: Path, files: list[Path], asked: ColumnsConfig | None) -> Listing:
    """Images as the Hub's `imagefolder` has them: `file_name` is relative to the `metadata`."""
    whole = Listing(files[0], folder.resolve().name, [])
    for file in files:
        listing = read_any_table(file, asked)
        whole.faults += listing.faults
        whole.notes += listing.notes
        if file.parent != folder:
            split = split_named(file.parent.name)
            prefix = file.parent.relative_to(folder).as_posix()
            listing.entries = [
                replace(entry, name=f"{prefix}/{entry.name}", split=entry.split or split)
                for entry in listing.entries
            ]
        whole.entries += listing.entries
    return whole


def read_any_table(file: Path, asked: ColumnsConfig | None) -> Listing:
    """A table by its ending."""
    if file.suffix == ".parquet":
        return read_parquet([file], file.resolve().parent.name, asked)
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        return read_json_lines(file, asked)
    return read_table(file, asked)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below one, with the names of their files; hidden ones left out, in their order."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(name for name in files if not name.startswith("."))
