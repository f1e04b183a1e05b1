"""Tables with a header, and files with a line for each image name, caption number and caption.

A table has a caption a row, or several in a cell, as a list or a line each. Its cells are separated
by commas, semicolons, tabs or bars: by whatever gives the header names of columns that are known.
"""

import csv
import re
from collections.abc import Hashable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmscale.config.data import ColumnsConfig
from mmscale.data.caption_text import captions_in, lines_of, listed
from mmscale.data.sources.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns, choose_columns
from mmscale.data.sources.records import (
    PICTURE,
    Entry,
    Listing,
    Rejection,
    label_of,
    name_of,
    number_of,
    read_lines,
)
from mmscale.errors import DataError

if TYPE_CHECKING:
    import _csv

_SEPARATORS = ("\t", ";", ",", "|")
_KAGGLE = re.compile(r"\s*[^|]+\|\s*(?:\w*number|\w*id)\s*\|[^|]+")


def read_table(file: Path, asked: ColumnsConfig | None = None) -> Listing:
    """A table with a header line, which names the columns of images and captions.

    Args:
        file: The table.
        asked: Which columns are taken; what it leaves open is guessed.

    Raises:
        DataError: It has no such columns, or is not csv.
    """
    lines = list(read_lines(file))
    # Excel's own line on the separator, which speaks of nothing else.
    separators: tuple[str, ...] = _SEPARATORS
    if lines and (told := re.fullmatch(r"sep=(.)", lines[0][1].strip())):
        separators, lines = (told[1],), lines[1:]
    if not lines:
        raise DataError(f"{file}: has no header line; it needs the columns image and caption")
    header = lines[0][1]
    separator = _separator(header, separators, asked)
    if separator == "|" and _KAGGLE.fullmatch(header):
        return read_barred(file)
    is_flickr = file.name.startswith(("results", "flickr_annotations"))
    listing = Listing(file, flickr_name(file) if is_flickr else file.resolve().parent.name, [])
    # A bare carriage return ends a row for csv, though it ended no line.
    text = [line.replace("\r", " ") + "\n" for _, line in lines]
    # Strict: else a quote that is never closed swallows the rows after it and nobody is told.
    rows = csv.reader(text, delimiter=separator, strict=True)
    limit = csv.field_size_limit(sum(map(len, text)))
    try:
        _read_rows(listing, rows, [where for where, _ in lines], asked)
    finally:
        csv.field_size_limit(limit)
    if is_flickr:
        listing.notes.clear()
    open_cells(listing)
    return listing


def _separator(header: str, among: tuple[str, ...], asked: ColumnsConfig | None) -> str:
    """What parts the header into names that are known, else the first that parts it at all."""
    images, captions = set(IMAGE_COLUMNS), set(CAPTION_COLUMNS)
    if asked is not None:
        images = {asked.image.lower()} if asked.image else images
        captions = {asked.captions.lower()} if asked.captions else captions
    for separator in among:
        names = set(_names(header.split(separator)))
        if names & images and names & captions:
            return separator
    return next((separator for separator in among if separator in header), ",")


def _names(header: list[str]) -> list[str]:
    return [name.strip().strip('"').strip().lower() for name in header]


def _read_rows(
    listing: Listing, rows: "_csv.Reader", places: list[str], asked: ColumnsConfig | None
) -> None:
    entries: dict[Hashable, Entry] = {}
    names: list[str] = []
    columns: Columns | None = None
    start = 0
    try:
        for cells in rows:
            where, start = places[start], rows.line_num
            if columns is None:
                names = _names(cells)
                columns = choose_columns(listing.file, names, asked)
                listing.notes += [columns.note] if columns.note else []
            elif len(cells) != len(names):
                reason = f"has {len(cells)} cells for {len(names)} columns"
                listing.faults.append(Rejection(where, f"{reason}; commas in captions want quotes"))
            else:
                fields = dict(zip(names, cells, strict=True))
                name = fields[columns.image].strip()
                take(entries, name, Entry(name), columns, fields, f"{listing.file}: {where}")
    except csv.Error as error:
        raise DataError(
            f"{listing.file}: {places[start]}: is not csv ({error}); mend the row's quotes"
        ) from error
    listing.entries = list(entries.values())


def take(
    entries: dict[Hashable, Entry],
    image: Hashable,
    new: Entry,
    columns: Columns,
    fields: Mapping[str, Any],
    where: str,
) -> Entry:
    """Add a row to its image's entry, which is `new` for the first row of that image.

    Raises:
        DataError: A row before said that the image is in another split.
    """
    given = {use: fields.get(column) for use, column in columns.others.items()}
    split = given.get("split") or new.split
    if image not in entries:
        new.split = split
    entry = entries.setdefault(image, new)
    if entry.split != split:
        raise DataError(
            f"{where}: {entry.name} is in {split} and in {entry.split}; an image may be in one "
            "split"
        )
    entry.captions.append(fields[columns.caption])
    entry.image_id = number_of(given.get("image_id"))
    entry.label = label_of(given.get("label"))
    entry.group = name_of(given.get("group"))
    return entry


def open_cells(listing: Listing) -> None:
    """Put captions in the place of cells that hold several, and note how cells were read."""
    texts = (cell for entry in listing.entries for cell in entry.captions if isinstance(cell, str))
    cells = [cell for cell in texts if listed(cell) is None]
    several = sum(len(lines_of(cell)) > 1 for cell in cells)
    by_line = bool(several) and several == len(cells)
    for entry in listing.entries:
        entry.captions = [
            caption for cell in entry.captions for caption in _captions_of(cell, by_line)
        ]
    what = listing.cells
    if by_line:
        listing.notes.append(f"{listing.file}: every {what} has several lines; each is a caption")
    elif several:
        listing.notes.append(
            f"{listing.file}: {several:,} {what}s of several lines are one caption each, as others "
            "have one line; write JSON lists where lines are captions"
        )
    odd = [cell for cell in cells if re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL)]
    if odd:
        listing.notes.append(
            f"{listing.file}: {len(odd):,} {what}s look like lists but hold no quoted texts, so "
            f"each is one caption, first {odd[0].strip()[:60]}"
        )


def _captions_of(cell: Any, by_line: bool) -> list[Any]:
    if not isinstance(cell, str):
        # A list as such; None and whatever else is no caption stays, to be named.
        return captions_in(cell) if isinstance(cell, (list, tuple, dict)) else [cell]
    found = listed(cell)
    if found is not None:
        return found
    return lines_of(cell) if by_line else [cell]


_TOKEN_LINE = re.compile(r"([^\t#]+)#(?:[a-z]+#)?(\d+)\t(.*)")
# One row of Kaggle's results.csv lacks its second bar, so a blank will do.
_BARRED_LINE = re.compile(r"([^|]+)\|\s*(\d+)\s*(?:\||\s)(.*)")


def read_token(file: Path) -> Listing:
    """A token file: `NAME#i<TAB>caption`."""
    return _read_numbered(file, _TOKEN_LINE, "NAME#i<TAB>caption")


def read_barred(file: Path) -> Listing:
    """Kaggle's `results.csv`: a header, then `NAME| number| caption`."""
    return _read_numbered(file, _BARRED_LINE, "NAME| number| caption", skip=1)


def _read_numbered(file: Path, form: re.Pattern[str], shape: str, skip: int = 0) -> Listing:
    """The lines of a file that have this form; captions are sorted by number."""
    listing = Listing(file, flickr_name(file), [])
    found: dict[str, list[tuple[int, str]]] = {}
    for where, line in islice(read_lines(file), skip, None):
        match = form.fullmatch(line)
        if match is None:
            listing.faults.append(Rejection(where, f"is not {shape}"))
        elif not PICTURE.fullmatch(name := match[1].strip()):
            listing.faults.append(Rejection(name, f"is not the name of an image ({where})"))
        else:
            found.setdefault(name, []).append((int(match[2]), match[3]))
    for name, captions in found.items():
        captions.sort(key=lambda numbered: numbered[0])
        listing.entries.append(Entry(name, [caption for _, caption in captions]))
    return listing


def flickr_name(file: Path) -> str:
    """Which of the two Flickr sets a caption file is of."""
    is_larger = file.name.startswith(("results", "flickr_annotations_30k"))
    return "flickr30k" if is_larger else "flickr8k"
