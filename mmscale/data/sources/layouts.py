"""Where the parts of a data set lie: guessed from a folder, or named by a recipe (`shards/*.yaml`).

Which caption files there are, who reads each, and whether they tell of the same images.
"""

import glob
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmscale.config.data import ColumnsConfig
from mmscale.config.load import read_yaml
from mmscale.config.paths import path_of
from mmscale.data.sources.beside import (
    has_texts_beside,
    metadata_in,
    read_any_table,
    read_metadata,
    read_texts_beside,
)
from mmscale.data.sources.records import (
    IMAGE_FOLDERS,
    Entry,
    Listing,
    Rejection,
    label_of,
    name_of,
    number_of,
    read_json,
    read_lines,
    stem_of,
)
from mmscale.data.sources.table import read_table, read_token
from mmscale.data.sources.typed import is_saved, parquet_in, read_parquet, read_saved
from mmscale.errors import ConfigError, DataError

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


# In a checkout links to the files in its `shards/`; in a wheel the files themselves.
_SHIPPED = Path(__file__).parents[1] / "recipes"
# Data of a recipe that is named and not pointed at lies below this, in the working folder.
_SHARDS = Path("shards")


@dataclass(frozen=True)
class Recipe:
    """Where the parts of a data set lie; None: look for them."""

    root: Path
    name: str | None = None
    images: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    splits: dict[str, tuple[str, ...]] | None = None
    columns: ColumnsConfig | None = None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with mmscale."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def shipped_recipe(path: Path) -> Recipe | None:
    """A recipe that comes with mmscale, by name or as `shards/NAME.yaml`; None: there is no such.

    Raises:
        DataError: The data is not where the recipe looks for it.
    """
    name = str(path).removeprefix(f"{_SHARDS}/").removesuffix(".yaml")
    return read_recipe(_SHIPPED / f"{name}.yaml", _SHARDS) if name in shipped_recipes() else None


def read_recipe(path: Path, base: Path | None = None) -> Recipe:
    """Read a recipe, as untrusted data.

    Args:
        path: The file.
        base: What its root is relative to; default the file's folder.

    Raises:
        DataError: A key it may not have, a value of another type, or no folder at its root.
    """
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    known = {"name", "root", "images", "captions", "splits"}
    if unknown := sorted(map(str, set(content) - known)):
        raise DataError(f"{path}: {unknown} is not of a recipe; it may have {sorted(known)}")
    for key in ("name", "root"):
        if not isinstance(content.get(key, ""), str):
            raise DataError(f"{path}: {key}={_shown(content[key])} is not a text; put it in quotes")
    splits = content.get("splits")
    if splits is not None and not isinstance(splits, dict):
        raise DataError(f"{path}: splits={_shown(splits)} is not a table of `split: list file`")
    try:
        root = (base or path.parent) / path_of(content.get("root", "."), f"{path}: root")
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not root.is_dir():
        raise DataError(
            f"{path}: its root {root} is no folder; unpack the data there or change root"
        )
    return Recipe(
        root,
        content.get("name"),
        _paths(path, "images", content.get("images")),
        _paths(path, "captions", content.get("captions")),
        splits
        and {str(name): _paths(path, "splits", files) or () for name, files in splits.items()},
    )


def _paths(recipe: Path, key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{recipe}: {key}={_shown(value)} is neither a path nor a list of paths")
    return tuple(values)


def _shown(value: Any) -> str:
    """A value in few words: aliases let a short file hold an endless one."""
    return reprlib.repr(value)


@dataclass(frozen=True)
class _Description:
    """Files that tell of a data set's images together, and who reads them."""

    files: tuple[Path, ...]
    read: Callable[[Path], Listing]

    @property
    def title(self) -> str:
        """Its files, by path."""
        return " and ".join(map(str, self.files))


def read_listings(recipe: Recipe) -> tuple[list[Listing], list[str]]:
    """Read the caption files that come first, and make sure that the others agree with them.

    Returns:
        A listing for each file that is used; a line for each description that is not.

    Raises:
        DataError: None is there, one cannot be read, or two disagree about the images.
    """
    found = _known(recipe) if recipe.captions is None else _named(recipe, recipe.captions)
    chosen, *others = found
    _require_columns(recipe, chosen)
    listings = [chosen.read(file) for file in chosen.files]
    _require_disjoint(listings)
    images, notes = _images(listings), []
    for other in others:
        described = _images([other.read(file) for file in other.files])
        _require_agreement(chosen, images, other, described)
        more = len(described - images)
        notes.append(
            f"captions come from {chosen.title}; {other.title} describes "
            + (f"{more:,} images more" if more else "no other images")
            + " and is not used"
        )
    return listings, notes


def is_known_folder(folder: Path) -> bool:
    """Whether a folder holds a caption file of a known name."""
    return bool(_known_files(Recipe(folder)))


def is_source_folder(folder: Path) -> bool:
    """Whether a folder holds pairs that can be read, by the names in it."""
    try:
        return bool(_known(Recipe(folder)))
    except DataError:
        return False


def _known_files(recipe: Recipe) -> list[_Description]:
    """Descriptions in a folder by their names, best first."""
    found, folders = [], _folders(recipe.root)
    tabled = partial(read_table, asked=recipe.columns)
    for names, read in (
        (_KARPATHY, read_karpathy),
        (_TABLES, tabled),
        (_TOKENS, read_token),
    ):
        found += [_Description((file,), read) for name in names for file in _find(folders, name)]
    coco = (sorted(recipe.root.glob(pattern)) for pattern in _COCO)
    if files := next((files for files in coco if files), None):
        found.append(_Description(tuple(files), read_coco))
    return found


def _known(recipe: Recipe) -> list[_Description]:
    """Descriptions of known names in a folder, best first; else what the folder shows itself."""
    if found := _known_files(recipe):
        return found
    root = recipe.root
    tables = sorted((*root.glob("*.csv"), *root.glob("*.tsv"), *root.glob("*.jsonl")))
    shown = _shown_by_folder(recipe, tables)
    if shown is not None:
        return [shown]
    seen = f" (it holds {', '.join(table.name for table in tables)})" if tables else ""
    raise DataError(
        f"{root}: no known data set{seen}; looked for "
        f"{', '.join((*_KARPATHY, *_TABLES, *_TOKENS))}, "
        "annotations/captions_*.json, metadata.csv, jsonl or parquet, what save_to_disk writes, "
        "parquet files, images with a .txt beside each, or a single csv, tsv or jsonl; name the "
        "caption file in a recipe (captions: FILE)"
    )


def _shown_by_folder(recipe: Recipe, tables: list[Path]) -> _Description | None:
    """What a folder without a known caption file holds; None where that is nothing known."""
    root, asked, name = recipe.root, recipe.columns, recipe.root.resolve().name
    if is_saved(root):
        return _Description((root,), lambda _: read_saved(root, name, asked))
    if metadata := metadata_in(root):
        return _Description(tuple(metadata[:1]), lambda _: read_metadata(root, metadata, asked))
    if len(tables) == 1:
        return _Description((tables[0],), partial(read_any_table, asked=asked))
    if not tables and (files := parquet_in(root)):
        return _Description(tuple(files[:1]), lambda _: read_parquet(files, name, asked))
    if not tables and has_texts_beside(root):
        return _Description((root,), read_texts_beside)
    return None


def _require_columns(recipe: Recipe, chosen: _Description) -> None:
    if recipe.columns is not None and chosen.read in (
        read_karpathy,
        read_coco,
        read_token,
        read_texts_beside,
    ):
        raise ConfigError(
            f"{chosen.title}: has no columns; leave --columns (data.columns of a run) away"
        )


def _named(recipe: Recipe, patterns: Sequence[str]) -> list[_Description]:
    """Descriptions that a recipe names; a pattern with a star may be several files together."""
    found, root, folders = [], recipe.root, _folders(recipe.root)
    read = partial(_read_by_content, asked=recipe.columns)
    for pattern in patterns:
        if glob.has_magic(pattern) and not (root / pattern).is_file():
            # Unlike Path.glob this takes absolute patterns too.
            matches = sorted(glob.glob(str(recipe.root / pattern)))  # noqa: PTH207
            if matches:
                found.append(_Description(tuple(map(Path, matches)), read))
        elif Path(pattern).is_absolute():
            found += [_Description((file,), read) for file in _find([root], pattern)]
        else:
            found += [_Description((file,), read) for file in _find(folders, pattern)]
    if not found:
        raise DataError(f"{recipe.root}: holds none of {', '.join(patterns)}")
    return found


def _folders(root: Path) -> list[Path]:
    """A folder and those in it."""
    return [root, *sorted(folder for folder in root.iterdir() if folder.is_dir())]


def _find(folders: list[Path], name: str) -> list[Path]:
    """Files of this name in folders, gzipped where there is no plain one."""
    found = []
    for folder in folders:
        plain, packed = folder / name, folder / f"{name}.gz"
        found += [file for file in (plain, packed) if file.is_file()][:1]
    return found


def _images(listings: list[Listing]) -> set[str]:
    """What files name, without folders and endings, which differ between descriptions."""
    return {stem_of(Path(entry.name).name) for one in listings for entry in one.entries}


def _require_agreement(
    chosen: _Description, images: set[str], other: _Description, described: set[str]
) -> None:
    """Refuse two descriptions that each name images which the other does not know.

    One may hold fewer: Karpathy's splits leave out images that the token file has.
    """
    ours, theirs = sorted(images - described), sorted(described - images)
    if ours and theirs:
        raise DataError(
            f"{chosen.title} and {other.title} disagree about the images: {ours[0]} is only in the "
            f"first ({len(ours):,} such), {theirs[0]} only in the second ({len(theirs):,} such); "
            "remove one, or name the one to use in a recipe (captions: FILE)"
        )


def _require_disjoint(listings: list[Listing]) -> None:
    """Refuse files, read together, that both have an image: it would be in two splits."""
    owners: dict[int, Path] = {}
    for listing in listings if len(listings) > 1 else ():
        for entry in listing.entries:
            if entry.image_id is None:
                continue
            owner = owners.setdefault(entry.image_id, listing.file)
            if owner != listing.file:
                raise DataError(
                    f"{owner} and {listing.file} disagree about image {entry.image_id}: both have "
                    "it; name the files of one year in a recipe (captions: PATTERN)"
                )


def _read_by_content(file: Path, asked: ColumnsConfig | None = None) -> Listing:
    """A file of any name, by its ending and, for JSON, by what it holds."""
    name = file.name.removesuffix(".gz")
    is_text = name.endswith(".txt") and name != "captions.txt"
    if name.endswith((".csv", ".tsv", ".jsonl", ".parquet")) or name == "captions.txt":
        return read_any_table(file, asked)
    if is_text and not _looks_numbered(file):
        return read_table(file, asked)
    if asked is not None:
        raise ConfigError(f"{file}: has no columns; leave --columns (data.columns) away")
    if name.endswith(".json"):
        content = read_json(file)
        return read_coco(file) if "annotations" in content else read_karpathy(file)
    return read_token(file)


def _looks_numbered(file: Path) -> bool:
    """Whether its first line is one of a token file."""
    first = next(read_lines(file), ("", ""))[1]
    return re.match(r"[^\t#]+#(?:[a-z]+#)?\d+\t", first) is not None


def read_coco(file: Path) -> Listing:
    """An annotation file; what follows `captions_` in its name tells the split and the folder.

    Raises:
        DataError: It is not in this layout.
    """
    content = read_json(file)
    part = file.name.removesuffix(".gz").removesuffix(".json").removeprefix("captions")
    part = part.removeprefix("_")
    split = match[0] if (match := re.match("[a-z]+", part)) else None
    folders = (
        tuple(f"{base}{part}" for base in ("", "../", "images/", "../images/")) if part else ()
    )
    listing = Listing(file, "coco", [], image_folders=(*folders, *IMAGE_FOLDERS))
    entries: dict[Any, Entry] = {}
    try:
        for image in content["images"]:
            if image["id"] in entries:
                raise DataError(f"{file}: has two images of id {image['id']}; download it again")
            entries[image["id"]] = Entry(str(image["file_name"]), [], split, number_of(image["id"]))
        for annotation in content["annotations"]:
            entries[annotation["image_id"]].captions.append(annotation["caption"])
    except KeyError as error:
        missing = f"nothing is called {error.args[0]}"
        raise DataError(f"{file}: is not in COCO's caption layout ({missing})") from error
    except TypeError as error:
        odd = "an image or annotation is not an object"
        raise DataError(f"{file}: is not in COCO's caption layout ({odd})") from error
    listing.entries = list(entries.values())
    return listing


def read_karpathy(file: Path) -> Listing:
    """A Karpathy file; images without what is needed are faults."""
    content = read_json(file)
    listing = Listing(file, str(content.get("dataset") or file.stem.removeprefix("dataset_")), [])
    for place, image in enumerate(content["images"]):
        try:
            folder, name = image.get("filepath"), image["filename"]
            name = f"{folder}/{name}" if folder else f"{name}"
            captions = [sentence["raw"] for sentence in image["sentences"]]
            # An empty name is no split, which is told of it later.
            split = image["split"] if isinstance(image["split"], str) else ""
        except (KeyError, TypeError, AttributeError):
            reason = "no filename, split or sentences with raw text"
            listing.faults.append(Rejection(f"{file.name}: image {place}", reason))
            continue
        image_id, label = number_of(image.get("cocoid")), label_of(image.get("label"))
        group = name_of(image.get("group"))
        listing.entries.append(Entry(name, captions, split, image_id, label, group))
    return listing
