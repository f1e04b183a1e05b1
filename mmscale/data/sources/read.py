"""A data set as it was downloaded, read into one list of records."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmscale.config.data import ColumnsConfig
from mmscale.data.caption_text import MOST_CAPTIONS
from mmscale.data.members import too_long
from mmscale.data.sources.cells import ImageCell
from mmscale.data.sources.layouts import (
    Recipe,
    read_listings,
    read_recipe,
    shipped_recipe,
    shipped_recipes,
)
from mmscale.data.sources.records import (
    PICTURE,
    Entry,
    Listing,
    Record,
    Rejection,
    Source,
    is_inside,
    key_of,
    read_lines,
    stem_of,
)
from mmscale.data.sources.typed import HUB, read_hub
from mmscale.errors import DataError

CAPTION_FILES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt", ".token", ".json")


def read_source(
    path: Path, images: Path | None = None, columns: ColumnsConfig | None = None
) -> Source:
    """Read a data set from its folder, its caption file or a recipe.

    Args:
        path: One of these, the name of a recipe that comes with mmscale, or `hf:ORG/NAME`.
        images: Folder of the images, where it cannot be found beside the captions.
        columns: Which columns of a table are what; the rest is guessed by name.

    Raises:
        DataError: No known layout, a file that cannot be read, or an image in two splits.
    """
    path = Path(path)
    notes: list[str] = []
    if str(path).startswith(HUB):
        recipe, listings = Recipe(path, splits={}), [read_hub(str(path), columns)]
    else:
        recipe = replace(_recipe_of(path), columns=columns)
        if images is not None:
            recipe = replace(recipe, images=(str(images.absolute()),))
        listings, notes = read_listings(recipe)
    lists = split_lists(recipe, listings)
    records: list[Record] = []
    rejected: list[Rejection] = []
    described: dict[Path, set[str]] = {}
    known = bool(lists) or any(e.split is not None for one in listings for e in one.entries)
    absent: list[NoImageError] = []
    for listing in listings:
        make_relative(recipe, listing)
        names = {entry.name for entry in listing.entries}
        listing.notes += apply_splits(listing, lists)
        notes += listing.notes
        rejected += listing.faults
        try:
            folder = resolve(recipe, listing, records, rejected)
        except NoImageError as error:
            absent.append(error)
            continue
        if folder is not None:
            described.setdefault(folder, set()).update(names)
    if len(absent) == len(listings):
        raise absent[0]
    notes += [f"left out: {error}" for error in absent]
    rejected += undescribed(listings, lists)
    rejected += _without_captions(recipe.root, described)
    numbered, classes = with_class_numbers(with_sound_ids(records))
    return Source(
        recipe.name or listings[0].source,
        tuple(listing.file for listing in listings),
        tuple(numbered),
        tuple(rejected),
        classes,
        tuple(notes),
        known,
        path,
    )


def _recipe_of(path: Path) -> Recipe:
    """Where the parts of a data set lie, by what a path is."""
    if path.is_dir():
        return Recipe(path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_recipe(path)
    if path.is_file() and path.name.removesuffix(".gz").endswith(CAPTION_FILES):
        return Recipe(path.parent, captions=(str(path.absolute()),))
    if (shipped := shipped_recipe(path)) is not None:
        return shipped
    raise DataError(
        f"{path}: is neither a folder nor a caption file ({', '.join(CAPTION_FILES)}) nor a "
        f"recipe (*.yaml, or {', '.join(shipped_recipes())}) nor a data set of the Hub "
        f"({HUB}ORG/NAME); check the path"
    )


def _without_captions(root: Path, described: dict[Path, set[str]]) -> list[Rejection]:
    """Pictures in the folders of images that no caption file names."""
    # Beside the caption files may lie pictures that were never part of the data set.
    return [
        Rejection(key_of(name), "no caption")
        for folder, names in described.items()
        if not folder.samefile(root)
        for name in sorted(file.name for file in os.scandir(folder))
        if PICTURE.fullmatch(name) and name not in names
    ]


# A tar header holds 100 bytes of name; the longest ending is `.jpeg`.
_KEY_BYTES = 90


class NoImageError(DataError):
    """A caption file of which no image is there."""


def resolve(
    recipe: Recipe, listing: Listing, records: list[Record], rejected: list[Rejection]
) -> Path | None:
    """Append the record of every entry, or why it has none, to the lists; its folder of images.

    There is none where the images lie in the table.

    Raises:
        NoImageError: No image is where it should be.
        DataError: No entry can be used.
    """
    in_table = bool(listing.entries) and all(one.cell is not None for one in listing.entries)
    folder = None if in_table else _image_folder(recipe, listing)
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
        about = (recipe.name or listing.source, entry.image_id, entry.label, entry.group)
        image = entry.cell or (folder or recipe.root) / entry.name
        records.append(Record(key, image, tuple(captions), split, *about))
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
                if any(is_file(folder / name) for name in names):
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


def is_there(image: Path | ImageCell) -> bool:
    """Whether an image is there; a name that no file system takes is none."""
    return isinstance(image, ImageCell) or is_file(image)


def is_file(path: Path) -> bool:
    """Whether a file is there."""
    try:
        return path.is_file()
    except OSError:
        return False


def _ending_hint(folders: list[Path], name: str) -> str | None:
    """What to say where only the ending is missing, or a name is an address."""
    if re.match("https?://", name):
        return "download them with img2dataset, and index its shards with mmscale index"
    for folder in folders:
        for ending in (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".PNG"):
            if is_file(folder / f"{name}{ending}"):
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


_SPLIT_LIST = re.compile(
    r"(?:Flickr_?(?:8|30)k[._])?(train|dev|val|test)[_\d]*(?:images)?\.txt", re.IGNORECASE
)
_SPLIT_NAMES = {
    "dev": "val",
    "valid": "val",
    "validation": "val",
    "restval": "train",
    "training": "train",
}


def split_lists(recipe: Recipe, listings: list[Listing]) -> dict[str, str]:
    """Split of each image's stem, from the split lists; empty where there are none.

    Raises:
        DataError: An image is in two splits, or a list cannot be read.
    """
    lists: dict[str, str] = {}
    for name, file in _find_lists(recipe, listings):
        split = _SPLIT_NAMES.get(name, name)
        for where, line in read_lines(file):
            stem = stem_of(line.strip())
            if lists.setdefault(stem, split) != split:
                raise DataError(
                    f"{where}: {stem} is in {split} and in {lists[stem]}; "
                    "an image may be in one split"
                )
    return lists


def _find_lists(recipe: Recipe, listings: list[Listing]) -> list[tuple[str, Path]]:
    if recipe.splits is not None:
        return [
            (split, recipe.root / file) for split, files in recipe.splits.items() for file in files
        ]
    # Caption files that tell splits know better.
    if any(entry.split is not None for listing in listings for entry in listing.entries):
        return []
    described = {stem_of(entry.name) for listing in listings for entry in listing.entries}
    return [
        (match[1].lower(), file)
        for folder in dict.fromkeys((recipe.root, listings[0].file.parent))
        for file in sorted(folder.iterdir())
        if (match := _SPLIT_LIST.fullmatch(file.name))
        and file.is_file()
        # The text beside an image is no list, whatever the image is called.
        and file.stem not in described
    ]


def _listed_split(name: str, lists: dict[str, str]) -> str | None:
    """The split of an image; lists may name it with its folder or without."""
    stem = stem_of(name)
    return lists.get(stem, lists.get(stem.rpartition("/")[2]))


def apply_splits(listing: Listing, lists: dict[str, str]) -> list[str]:
    """Give every entry its split and drop those without; a line for what a person should know."""
    kept, without = [], 0
    for entry in listing.entries:
        split = _listed_split(entry.name, lists) if lists else entry.split
        without += split is None
        if lists and split is None:
            continue
        entry.split = "train" if split is None else _SPLIT_NAMES.get(split, split)
        kept.append(entry)
    which = "all" if without == len(listing.entries) else f"{without:,} of"
    total = f"{which} {len(listing.entries):,} images of {listing.file}"
    listing.entries = kept
    if not without:
        return []
    if lists:
        return [f"{total} are in no split list and are left out"]
    return [
        f"no split is known for {total} (no column `split`, no list such as valImages.txt beside "
        "it): they become train; --hold-out 0.1, or data.hold_out of a "
        "run, keeps a tenth of them for val"
    ]


def undescribed(listings: list[Listing], lists: dict[str, str]) -> list[Rejection]:
    """Images that a split list names and no caption file describes."""
    stems = {stem_of(entry.name) for listing in listings for entry in listing.entries}
    described = stems | {stem.rpartition("/")[2] for stem in stems}
    missing = (item for item in lists.items() if item[0] not in described)
    return [Rejection(key_of(stem), "no caption", split) for stem, split in missing]
