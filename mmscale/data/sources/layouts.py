"""Which caption files a folder holds, and who reads each."""

from pathlib import Path

from mmscale.data.sources.coco import read_coco
from mmscale.data.sources.karpathy import read_karpathy
from mmscale.data.sources.listing import Listing, read_json
from mmscale.data.sources.numbered import read_token
from mmscale.data.sources.recipe import Recipe
from mmscale.data.sources.table import read_table
from mmscale.errors import DataError

_KARPATHY = ("dataset_flickr30k.json", "dataset_flickr8k.json", "dataset_coco.json", "dataset.json")
_TABLES = (
    "results.csv",
    "flickr_annotations_30k.csv",
    "flickr_annotations_8k.csv",
    "captions.csv",
    "captions.txt",
    "captions.tsv",
)
_TOKENS = ("results_20130124.token", "results.token", "Flickr8k.token.txt", "token.txt")
_COCO = ("annotations/captions_*.json", "captions_*.json", "captions.json")


def read_listings(recipe: Recipe) -> list[Listing]:
    """Read the caption file that the recipe names, else the first that is known; COCO has several.

    Raises:
        DataError: None is there, or one cannot be read.
    """
    if recipe.captions is not None:
        found = _find(recipe.root, recipe.captions)
        if found is None:
            raise DataError(f"{recipe.root}: holds none of {', '.join(recipe.captions)}")
        return [_read_by_content(found)]
    for names, read in (
        (_KARPATHY, read_karpathy),
        (_TABLES, read_table),
        (_TOKENS, read_token),
    ):
        if found := _find(recipe.root, names):
            return [read(found)]
    if found_coco := _find_coco(recipe.root):
        return [read_coco(file) for file in found_coco]
    if len(tables := sorted(recipe.root.glob("*.csv"))) == 1:
        return [read_table(tables[0])]
    raise DataError(
        f"{recipe.root}: no known data set; looked for "
        f"{', '.join((*_KARPATHY, *_TABLES, *_TOKENS))}, "
        "annotations/captions_*.json; name the caption file in a recipe (captions: FILE)"
    )


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files, plain or gzipped, in a folder or one folder below."""
    for name in names:
        for file in (root / name, root / f"{name}.gz"):
            if file.is_file():
                return file
        below = sorted((*root.glob(f"*/{name}"), *root.glob(f"*/{name}.gz")))
        if below:
            return below[0]
    return None


def _find_coco(root: Path) -> list[Path]:
    for pattern in _COCO:
        if found := sorted(root.glob(pattern)):
            return found
    return []


def _read_by_content(file: Path) -> Listing:
    """A file of any name, by its ending and, for JSON, by what it holds."""
    name = file.name.removesuffix(".gz")
    if name.endswith(".json"):
        content = read_json(file)
        return read_coco(file) if "annotations" in content else read_karpathy(file)
    if name.endswith((".csv", ".tsv")) or name == "captions.txt":
        return read_table(file)
    return read_token(file)
