"""Tables with a header, csv or tab-separated: a caption a row, or a JSON list of them in a cell."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.data.sources.listing import (
    Entry,
    Listing,
    label_of,
    name_of,
    number_of,
    read_lines,
)
from mmscale.data.sources.numbered import flickr_name, read_barred
from mmscale.data.sources.records import Rejection
from mmscale.errors import DataError

if TYPE_CHECKING:
    import _csv

_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "path")
_CAPTION_COLUMNS = ("caption", "captions", "comment", "raw", "text", "title")


def read_table(file: Path) -> Listing:
    """A table with a header line, which names the columns of images and captions.

    Raises:
        DataError: It has no such columns, or is not csv.
    """
    lines = list(read_lines(file))
    if not lines:
        raise DataError(f"{file}: has no header line; it needs the columns image and caption")
    header = lines[0][1]
    if "|" in header:
        return read_barred(file)
    is_flickr = file.name.startswith(("results", "flickr_annotations"))
    listing = Listing(file, flickr_name(file) if is_flickr else file.resolve().parent.name, [])
    # A bare carriage return ends a row for csv, though it ended no line.
    text = [line.replace("\r", " ") + "\n" for _, line in lines]
    # Strict: else a quote that is never closed swallows the rows after it and nobody is told.
    rows = csv.reader(text, delimiter="\t" if "\t" in header else ",", strict=True)
    limit = csv.field_size_limit(sum(map(len, text)))
    try:
        _read_rows(listing, rows, [where for where, _ in lines])
    finally:
        csv.field_size_limit(limit)
    return listing


def _read_rows(listing: Listing, rows: "_csv.Reader", places: list[str]) -> None:
    entries: dict[str, Entry] = {}
    columns: list[str] = []
    start = 0
    try:
        for cells in rows:
            where, start = places[start], rows.line_num
            if not columns:
                columns = _columns(listing.file, cells)
            elif len(cells) != len(columns):
                reason = f"has {len(cells)} cells for {len(columns)} columns"
                listing.faults.append(Rejection(where, f"{reason}; commas in captions want quotes"))
            else:
                _take(entries, dict(zip(columns, cells, strict=True)), f"{listing.file}: {where}")
    except csv.Error as error:
        raise DataError(
            f"{listing.file}: {places[start]}: is not csv ({error}); mend the row's quotes"
        ) from error
    listing.entries = list(entries.values())


def _columns(file: Path, header: list[str]) -> list[str]:
    """Names of the columns, `image` and `caption` under these names."""
    names = [name.strip().lower() for name in header]
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    caption = next((name for name in _CAPTION_COLUMNS if name in names), None)
    if image is None or caption is None:
        raise DataError(
            f"{file}: its columns are {', '.join(names)[:200]}; it needs "
            f"one of {', '.join(_IMAGE_COLUMNS)} and one of {', '.join(_CAPTION_COLUMNS)}"
        )
    return [{image: "image", caption: "caption"}.get(name, name) for name in names]


def _take(entries: dict[str, Entry], fields: dict[str, str], where: str) -> None:
    """Add a row to its image's entry."""
    name, split = fields["image"].strip(), fields.get("split") or None
    entry = entries.setdefault(name, Entry(name, split=split))
    if entry.split != split:
        raise DataError(
            f"{where}: {name} is in {split} and in {entry.split}; an image may be in one split"
        )
    entry.captions += _cell_captions(fields["caption"])
    entry.image_id = number_of(fields.get("image_id"))
    entry.label = label_of(fields.get("label"))
    entry.group = name_of(fields.get("group"))


def _cell_captions(cell: str) -> list[str]:
    """A cell's caption, or its captions where it holds a JSON list of texts."""
    if cell.lstrip().startswith("["):
        try:
            captions = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell]
        if isinstance(captions, list) and all(isinstance(c, str) for c in captions):
            return captions
    return [cell]
