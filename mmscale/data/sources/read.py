"""A data set as it was downloaded, read into one list of records."""

import os
from pathlib import Path

from mmscale.data.sources.layouts import read_listings
from mmscale.data.sources.names import PICTURE, key_of
from mmscale.data.sources.recipe import Recipe, read_recipe
from mmscale.data.sources.records import Record, Rejection, Source
from mmscale.data.sources.resolve import resolve, with_class_numbers, with_sound_ids
from mmscale.data.sources.splits import apply_splits, split_lists, undescribed
from mmscale.errors import DataError


def read_source(path: Path) -> Source:
    """Read a data set from its folder or from a recipe.

    Raises:
        DataError: No known layout, a file that cannot be read, or an image in two splits.
    """
    path = Path(path)
    if path.is_dir():
        recipe = Recipe(path)
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        recipe = read_recipe(path)
    else:
        raise DataError(f"{path}: is neither a folder nor a recipe (*.yaml); check the path")
    listings, notes = read_listings(recipe)
    lists = split_lists(recipe, listings)
    records: list[Record] = []
    rejected: list[Rejection] = []
    described: dict[Path, set[str]] = {}
    for listing in listings:
        names = {entry.name for entry in listing.entries}
        notes += apply_splits(listing, lists)
        rejected += listing.faults
        folder = resolve(recipe, listing, records, rejected)
        described.setdefault(folder, set()).update(names)
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
