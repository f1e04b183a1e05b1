"""Which split an image is of: what its caption file says, else the split lists beside it."""

import re
from pathlib import Path

from mmscale.data.sources.listing import Listing, read_lines
from mmscale.data.sources.names import key_of, stem_of
from mmscale.data.sources.recipe import Recipe
from mmscale.data.sources.records import Rejection
from mmscale.errors import DataError

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
    return [
        (match[1].lower(), file)
        for folder in dict.fromkeys((recipe.root, listings[0].file.parent))
        for file in sorted(folder.iterdir())
        if (match := _SPLIT_LIST.fullmatch(file.name)) and file.is_file()
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
        "it): they become train; --hold-out 0.1 keeps a tenth of them for val"
    ]


def undescribed(listings: list[Listing], lists: dict[str, str]) -> list[Rejection]:
    """Images that a split list names and no caption file describes."""
    stems = {stem_of(entry.name) for listing in listings for entry in listing.entries}
    described = stems | {stem.rpartition("/")[2] for stem in stems}
    missing = (item for item in lists.items() if item[0] not in described)
    return [Rejection(key_of(stem), "no caption", split) for stem, split in missing]
