"""Tables with a header, and files with a line for each image name, caption number and caption.

A table has a caption a row, or several in a cell, as a list or a line each. Its cells are separated
by commas, semicolons, tabs or bars: by whatever gives the header names of columns that are known.
"""

import csv
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.data.caption_text import CAPTION_NAMES, lines_of, listed
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

_IMAGE_COLUMNS = (
    "image", "image_name", "image_path", "img_path", "filename", "file_name", "filepath",
    "file_path", "path", "img", "file",
)  # fmt: skip
_CAPTION_COLUMNS = tuple(
    dict.fromkeys(("caption", "captions", "comment", "raw", "text", "title", *CAPTION_NAMES))
)
_SEPARATORS = ("\t", ";", ",", "|")
_KAGGLE = re.compile(r"\s*[^|]+\|\s*(?:\w*number|\w*id)\s*\|[^|]+")


def read_table(file: Path) -> Listing:
    """A table with a header line, which names the columns of images and captions.

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
    separator = _separator(header, separators)
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
        _read_rows(listing, rows, [where for where, _ in lines])
    finally:
        csv.field_size_limit(limit)
    _open_cells(listing)
    return listing


def _separator(header: str, among: tuple[str, ...]) -> str:
    """What parts the header into names that are known, else the first that parts it at all."""
    for separator in among:
        names = _names(header.split(separator))
        if set(names) & set(_IMAGE_COLUMNS) and set(names) & set(_CAPTION_COLUMNS):
            return separator
    return next((separator for separator in among if separator in header), ",")


def _names(header: list[str]) -> list[str]:
    return [name.strip().strip('"').strip().lower() for name in header]


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
    names = _names(header)
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    caption = next((name for name in _CAPTION_COLUMNS if name in names), None)
    if image is None or caption is None:
        raise DataError(
            f"{file}: its columns are {', '.join(names)[:200]}; it needs "
            f"one of {', '.join(_IMAGE_COLUMNS)} and one of {', '.join(_CAPTION_COLUMNS)}, parted "
            "by commas, semicolons, tabs or bars"
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
    entry.captions.append(fields["caption"])
    entry.image_id = number_of(fields.get("image_id"))
    entry.label = label_of(fields.get("label"))
    entry.group = name_of(fields.get("group"))


def _open_cells(listing: Listing) -> None:
    """Put captions in the place of cells that hold several, and note how cells were read."""
    cells = [cell for entry in listing.entries for cell in entry.captions if listed(cell) is None]
    several = sum(len(lines_of(cell)) > 1 for cell in cells)
    by_line = bool(several) and several == len(cells)
    for entry in listing.entries:
        entry.captions = [
            caption for cell in entry.captions for caption in _captions_of(cell, by_line)
        ]
    if by_line:
        listing.notes.append(f"{listing.file}: every cell has several lines; each is a caption")
    elif several:
        listing.notes.append(
            f"{listing.file}: {several:,} cells of several lines are one caption each, as others "
            "have one line; write JSON lists where lines are captions"
        )
    odd = [cell for cell in cells if re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL)]
    if odd:
        listing.notes.append(
            f"{listing.file}: {len(odd):,} cells look like lists but hold no quoted texts, so each "
            f"is one caption, first {odd[0].strip()[:60]}"
        )


def _captions_of(cell: str, by_line: bool) -> list[str]:
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
