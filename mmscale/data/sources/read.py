"""A data set as it was downloaded, read into one list of records."""

from pathlib import Path

from mmscale.data.sources.layouts import read_listings
from mmscale.data.sources.recipe import Recipe, read_recipe
from mmscale.data.sources.records import Record, Rejection, Source
from mmscale.data.sources.resolve import resolve, with_sound_ids
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
    listings = read_listings(recipe)
    lists = split_lists(recipe, listings)
    records: list[Record] = []
    rejected: list[Rejection] = []
    unlisted = 0
    for listing in listings:
        unlisted += apply_splits(listing, lists)
        rejected += listing.faults
        resolve(recipe, listing, records, rejected)
    rejected += undescribed(listings, lists)
    return Source(
        recipe.name or listings[0].source,
        tuple(listing.file for listing in listings),
        tuple(with_sound_ids(records)),
        tuple(rejected),
        unlisted,
    )
