"""A data set as it was downloaded, read into one list of records."""

import os
from dataclasses import replace
from pathlib import Path

from mmscale.data.sources.layouts import read_listings
from mmscale.data.sources.names import PICTURE, key_of
from mmscale.data.sources.recipe import Recipe, read_recipe
from mmscale.data.sources.records import Record, Rejection, Source
from mmscale.data.sources.resolve import (
    NoImageError,
    make_relative,
    resolve,
    with_class_numbers,
    with_sound_ids,
)
from mmscale.data.sources.splits import apply_splits, split_lists, undescribed
from mmscale.errors import DataError

_CAPTION_FILES = (".csv", ".tsv", ".txt", ".token", ".json")


def read_source(path: Path, images: Path | None = None) -> Source:
    """Read a data set from its folder, its caption file or a recipe.

    Args:
        path: One of these.
        images: Folder of the images, where it cannot be found beside the captions.

    Raises:
        DataError: No known layout, a file that cannot be read, or an image in two splits.
    """
    path = Path(path)
    if path.is_dir():
        recipe = Recipe(path)
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        recipe = read_recipe(path)
    elif path.is_file() and path.name.removesuffix(".gz").endswith(_CAPTION_FILES):
        recipe = Recipe(path.parent, captions=(str(path.absolute()),))
    else:
        raise DataError(
            f"{path}: is neither a folder nor a caption file ({', '.join(_CAPTION_FILES)}) nor a "
            "recipe (*.yaml); check the path"
        )
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
