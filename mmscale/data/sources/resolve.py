"""Entries of a caption file made into records: every name, caption and id checked, images found."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmscale.data.caption_lists import MOST_CAPTIONS
from mmscale.data.members import too_long
from mmscale.data.sources.listing import Entry, Listing
from mmscale.data.sources.names import is_inside, key_of
from mmscale.data.sources.recipe import Recipe
from mmscale.data.sources.records import Record, Rejection
from mmscale.errors import DataError

# A tar header holds 100 bytes of name; the longest ending is `.jpeg`.
_KEY_BYTES = 90


class NoImageError(DataError):
    """A caption file of which no image is there."""


def resolve(
    recipe: Recipe, listing: Listing, records: list[Record], rejected: list[Rejection]
) -> Path:
    """Append the record of every entry, or why it has none, to the lists; its folder of images.

    Raises:
        NoImageError: No image is where it should be.
        DataError: No entry can be used.
    """
    folder = _image_folder(recipe, listing)
    seen = {record.key for record in records}
    for entry in listing.entries:
        split = entry.split or ""
        fault = _fault_of(entry, split)
        key = key_of(entry.name)
        captions = []
        for place, caption in enumerate(entry.captions if fault is None else []):
            if reason := _caption_fault(caption):
                rejected.append(Rejection(f"{key}#{place}", reason, split or None))
            else:
                captions.append(caption.strip())
        if fault is None and not captions:
            fault = "no caption"
        if len(captions) > MOST_CAPTIONS:
            fault = f"more than {MOST_CAPTIONS} captions: {len(captions)}"
        if fault is None and key in seen:
            fault = "duplicate key: another image has it"
        if fault is not None:
            rejected.append(Rejection(key, fault, split or None))
            continue
        seen.add(key)
        image = folder / entry.name
        name = recipe.name or listing.source
        records.append(
            Record(
                key,
                image,
                tuple(captions),
                split,
                name,
                entry.image_id,
                entry.label,
                entry.group,
            )
        )
    return folder


def _image_folder(recipe: Recipe, listing: Listing) -> Path:
    candidates = recipe.images or listing.image_folders
    base = recipe.root
    names = [entry.name for entry in listing.entries if is_inside(entry.name)]
    if not names:
        raise DataError(f"{listing.file}: no row of it can be used; {_first_fault(listing)}")
    tried = []
    for candidate in candidates:
        inner = Path(candidate).name
        for folder in (base / candidate, base / candidate / inner, listing.file.parent / candidate):
            if folder.is_dir():
                tried.append(folder)
                if any(_is_file(folder / name) for name in names):
                    return folder
    raise NoImageError(
        f"{base}: none of the {len(names):,} images that {listing.file.name} names, first "
        f"{names[0]}, lies in {', '.join(candidates)}; "
        + (
            _ending_hint(tried, names[0])
            or "put them there, or name their folder with --images or in a recipe (images: FOLDER)"
        )
    )


def make_relative(recipe: Recipe, listing: Listing) -> None:
    """Absolute names become relative where they lie in the data set's folder or that of images."""
    folders = [recipe.root / images for images in recipe.images or ()] + [recipe.root]
    places = [place for folder in folders for place in (folder.absolute(), folder.resolve())]
    for entry in listing.entries:
        name = entry.name.removeprefix("file://")
        if Path(name).is_absolute():
            inside = (p for p in places if Path(name).is_relative_to(p))
            if (place := next(inside, None)) is not None:
                entry.name = str(Path(name).relative_to(place))


def _first_fault(listing: Listing) -> str:
    if listing.faults:
        return f"the first fault of {len(listing.faults):,}: {_shown(listing.faults[0])}"
    if listing.entries:
        name = listing.entries[0].name
        hint = "; name the folder of images with --images" if Path(name).is_absolute() else ""
        return f"{name or 'a row'}: {_fault_of(listing.entries[0], 'train')}{hint}"
    return listing.notes[-1] if listing.notes else "it has none"


def _shown(fault: Rejection) -> str:
    return f"{fault.key}: {fault.reason}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _ending_hint(folders: list[Path], name: str) -> str | None:
    """What to say where only the ending is missing."""
    for folder in folders:
        for ending in (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".PNG"):
            if _is_file(folder / f"{name}{ending}"):
                return f"{folder} holds {name}{ending}: write names with their ending"
    return None


def _fault_of(entry: Entry, split: str) -> str | None:
    if not entry.name:
        return "no file name"
    if not is_inside(entry.name):
        return "its file name leaves the folder of images"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        return f"split {split!r} is not a name"
    if len(key_of(entry.name).encode(errors="replace")) > _KEY_BYTES:
        return f"its name is longer than {_KEY_BYTES} bytes"
    return None


def _caption_fault(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return "caption is not a text"
    if not caption.strip():
        return "empty caption"
    if length := too_long(caption):
        return f"caption too long: {length}"
    if "\0" in caption:
        return "caption not UTF-8: it holds NUL"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "caption not UTF-8"
    return None


def with_class_numbers(records: list[Record]) -> tuple[list[Record], tuple[str, ...]]:
    """Labels as numbers, and the names that they number where one of them is a name."""
    labels = [record.label for record in records]
    if not any(isinstance(label, str) for label in labels):
        return records, ()
    names = sorted({str(label) for label in labels if label is not None})
    numbers = {name: number for number, name in enumerate(names)}
    numbered = [
        record if record.label is None else replace(record, label=numbers[str(record.label)])
        for record in records
    ]
    return numbered, tuple(names)


def with_sound_ids(records: list[Record]) -> list[Record]:
    """The source's own ids where every image has one of its own, else none."""
    own = {record.image_id for record in records}
    if None not in own and len(own) == len(records):
        return records
    return [replace(record, image_id=None) for record in records]
