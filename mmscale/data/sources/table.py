"""Tables with a header, csv or tab-separated: a caption a row, or a JSON list of them in a cell."""

import csv
import io
import json
from pathlib import Path

from mmscale.data.sources.listing import Entry, Listing, number_of, read_lines
from mmscale.data.sources.numbered import flickr_name, read_barred
from mmscale.data.sources.records import Rejection
from mmscale.errors import DataError

_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "path")
_CAPTION_COLUMNS = ("caption", "captions", "comment", "raw", "text", "title")


def read_table(file: Path) -> Listing:
    """A table with a header line, which names the columns of images and captions.

    Raises:
        DataError: It has no such columns, or is not csv.
    """
    header = next((line for _, line in read_lines(file)), None)
    if header is None:
        raise DataError(f"{file}: has no header line; it needs the columns image and caption")
    if "|" in header:
        return read_barred(file)
    is_flickr = file.name.startswith(("results", "flickr_annotations"))
    name = flickr_name(file) if is_flickr else file.resolve().parent.name
    lines = list(read_lines(file))
    faults = [Rejection(where, "is not UTF-8") for where, line in lines if line is None]
    text = "\n".join(line for _, line in lines if line is not None)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    return Listing(file, name, _read_rows(file, rows), faults)


def _read_rows(file: Path, rows: "csv.DictReader[str]") -> list[Entry]:
    columns = {column.strip().lower(): column for column in rows.fieldnames or [] if column}
    image = next((columns[c] for c in _IMAGE_COLUMNS if c in columns), None)
    caption = next((columns[c] for c in _CAPTION_COLUMNS if c in columns), None)
    if image is None or caption is None:
        raise DataError(
            f"{file}: its columns are {', '.join(columns)}; it needs "
            f"one of {', '.join(_IMAGE_COLUMNS)} and one of {', '.join(_CAPTION_COLUMNS)}"
        )
    entries: dict[str, Entry] = {}
    try:
        for row in rows:
            fields = {key: row[column] for key, column in columns.items()}
            name = str(row[image]).strip()
            entry = entries.setdefault(name, Entry(name))
            entry.captions += _cell_captions(row[caption])
            entry.split = fields.get("split") or None
            entry.image_id = number_of(fields.get("image_id"))
            entry.label = number_of(fields.get("label"))
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: is not csv ({error})") from error
    return list(entries.values())


def _cell_captions(cell: str | None) -> list[str]:
    """A cell's caption, or its captions where it holds a JSON list of texts."""
    if cell and cell.lstrip().startswith("["):
        try:
            captions = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell]
        if isinstance(captions, list) and all(isinstance(c, str) for c in captions):
            return captions
    return [cell or ""]
