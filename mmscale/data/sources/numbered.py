"""Files with a line for each image name, caption number and caption: token files, barred csv."""

import re
from itertools import islice
from pathlib import Path

from mmscale.data.sources.records import PICTURE, Entry, Listing, Rejection, read_lines

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
