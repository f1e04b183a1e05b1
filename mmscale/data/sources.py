"""Image-caption data sets as they are downloaded, read into one list of records for `pack`.

Known layouts: Flickr30k and Flickr8k (Karpathy JSON over csv over token file), COCO annotations,
plain csv; or a recipe (`shards/*.yaml`) that names the parts. Whatever a file says is checked.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

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
_IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k-images",
    "flickr30k_images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    ".",
)
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
_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "path")
_CAPTION_COLUMNS = ("caption", "captions", "comment", "raw", "text", "title")
_PICTURE = re.compile(r".+\.(?:jpe?g|png|webp)", re.IGNORECASE)
_TOKEN_LINE = re.compile(r"([^\t#]+)#(?:[a-z]+#)?(\d+)\t(.*)")
# One row of Kaggle's results.csv lacks its second bar, so a blank will do.
_PIPED_LINE = re.compile(r"([^|]+)\|\s*(\d+)\s*(?:\||\s)(.*)")
# A tar header holds 100 bytes of name; the longest ending is `.jpeg`.
_KEY_BYTES = 90


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
        key: Its name in a shard: no dot, no slash, no blank.
        image: The image file; not looked at yet.
        captions: At least one, none empty.
        split: `train`, `val`, `test`, or a name of the source's own.
        source: Name of the data set.
        image_id: The source's own identity of the image, where it has one.
        label: Class of the image, where it has one.
    """

    key: str
    image: Path
    captions: tuple[str, ...]
    split: str
    source: str
    image_id: int | None = None
    label: int | None = None


@dataclass(frozen=True)
class Rejection:
    """An image or caption that was left out; `split` is None where nothing tells it."""

    key: str
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set that was read.

    Attributes:
        name: Its name.
        described_by: The files that the captions came from.
        records: Its images in the order of those files.
        rejected: What was left out, and why.
        unlisted: Images that no split list names; they belong to no split.
    """

    name: str
    described_by: tuple[Path, ...]
    records: tuple[Record, ...]
    rejected: tuple[Rejection, ...]
    unlisted: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have records: train, val, test, then others by name."""
        usual = ("train", "val", "test")
        found = {record.split for record in self.records}
        return (*(s for s in usual if s in found), *sorted(found.difference(usual)))


@dataclass
class _Entry:
    """An image as a caption file describes it."""

    name: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None
    image_id: int | None = None
    label: int | None = None


@dataclass
class _Listing:
    """What one caption file says."""

    file: Path
    source: str
    entries: list[_Entry]
    faults: list[Rejection] = field(default_factory=list)
    image_folders: tuple[str, ...] = _IMAGE_FOLDERS


@dataclass(frozen=True)
class _Recipe:
    """Where the parts of a data set lie; None: look for them."""

    root: Path
    name: str | None = None
    images: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    splits: dict[str, tuple[str, ...]] | None = None


def image_id_of(source: str, key: str) -> int:
    """A 63-bit identity for an image whose source gives none."""
    digest = hashlib.blake2b(f"{source}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_source(path: Path) -> Source:
    """Read a data set from its folder or from a recipe.

    Raises:
        DataError: No known layout, a file that cannot be read, or an image in two splits.
    """
    path = Path(path)
    if path.is_dir():
        recipe = _Recipe(path)
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        recipe = _read_recipe(path)
    else:
        raise DataError(f"{path}: is neither a folder nor a recipe (*.yaml); check the path")
    listings = _read_listings(recipe)
    lists = _split_lists(recipe, listings)
    records: list[Record] = []
    rejected: list[Rejection] = []
    unlisted = 0
    for listing in listings:
        unlisted += _apply_splits(listing, lists)
        rejected += listing.faults
        _resolve(recipe, listing, records, rejected)
    rejected += _undescribed(listings, lists)
    return Source(
        recipe.name or listings[0].source,
        tuple(listing.file for listing in listings),
        tuple(_with_sound_ids(records)),
        tuple(rejected),
        unlisted,
    )


# --- Recipes ---


def _read_recipe(path: Path) -> _Recipe:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({error}); mend the recipe") from error
    known = {"name", "root", "images", "captions", "splits"}
    if not isinstance(content, dict) or not set(content) <= known:
        unknown = sorted(map(str, set(content) - known)) if isinstance(content, dict) else content
        raise DataError(f"{path}: {unknown!r} is not of a recipe; it may have {sorted(known)}")
    for key in ("name", "root"):
        if not isinstance(content.get(key, ""), str):
            raise DataError(f"{path}: {key}={content[key]!r} is not a text; put it in quotes")
    splits = content.get("splits")
    if splits is not None and not isinstance(splits, dict):
        raise DataError(f"{path}: splits={splits!r} is not a table of `split: list file`")
    root = path.parent / Path(content.get("root", ".")).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{path}: its root {root} is no folder; unpack the data there or change root"
        )
    return _Recipe(
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
        raise DataError(f"{recipe}: {key}={value!r} is neither a path nor a list of paths")
    return tuple(values)


# --- Finding the caption files ---


def _read_listings(recipe: _Recipe) -> list[_Listing]:
    if recipe.captions is not None:
        found = next(filter(None, (_find(recipe.root, (name,)) for name in recipe.captions)), None)
        if found is None:
            raise DataError(f"{recipe.root}: holds none of {', '.join(recipe.captions)}")
        return [_read_by_content(found)]
    for names, read in (
        (_KARPATHY, _read_karpathy),
        (_TABLES, _read_table),
        (_TOKENS, _read_token),
    ):
        if found := _find(recipe.root, names):
            return [read(found)]
    if found_coco := _find_coco(recipe.root):
        return [_read_coco(file) for file in found_coco]
    if len(tables := sorted(recipe.root.glob("*.csv"))) == 1:
        return [_read_table(tables[0])]
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


def _read_by_content(file: Path) -> _Listing:
    name = file.name.removesuffix(".gz")
    if name.endswith(".json"):
        content = _read_json(file)
        return _read_coco(file) if "annotations" in content else _read_karpathy(file)
    if name.endswith((".csv", ".tsv")) or name == "captions.txt":
        return _read_table(file)
    return _read_token(file)


# --- Reading caption files ---


def _read_lines(file: Path) -> Iterator[tuple[str, str | None]]:
    """Each line with its place; None where it is not UTF-8."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); download it again") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().rstrip("\r")
        except UnicodeDecodeError:
            yield f"{file.name}:{number}", None
            continue
        if text.strip():
            yield f"{file.name}:{number}", text


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
        parsed = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("images"), list):
        raise DataError(f'{file}: has no list "images"; it is not a caption file')
    return parsed


def _number(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\d{1,19}", value):
        value = int(value)
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if sound else None


def _read_karpathy(file: Path) -> _Listing:
    content = _read_json(file)
    listing = _Listing(file, str(content.get("dataset") or file.stem.removeprefix("dataset_")), [])
    for place, image in enumerate(content["images"]):
        try:
            folder, name = image.get("filepath"), image["filename"]
            name = f"{folder}/{name}" if folder else f"{name}"
            captions = [sentence["raw"] for sentence in image["sentences"]]
            split = image["split"]
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"no filename, split or sentences with raw text ({error})"
            listing.faults.append(Rejection(f"{file.name}: image {place}", reason))
            continue
        listing.entries.append(
            _Entry(name, captions, split, _number(image.get("cocoid")), _number(image.get("label")))
        )
    return listing


def _read_coco(file: Path) -> _Listing:
    content = _read_json(file)
    part = file.name.removesuffix(".gz").removesuffix(".json").removeprefix("captions")
    part = part.removeprefix("_")
    split = match[0] if (match := re.match("[a-z]+", part)) else None
    folders = (
        tuple(f"{base}{part}" for base in ("", "../", "images/", "../images/")) if part else ()
    )
    listing = _Listing(file, "coco", [], image_folders=(*folders, *_IMAGE_FOLDERS))
    entries: dict[Any, _Entry] = {}
    try:
        for image in content["images"]:
            entries[image["id"]] = _Entry(str(image["file_name"]), [], split, _number(image["id"]))
        for annotation in content["annotations"]:
            entries[annotation["image_id"]].captions.append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: is not in COCO's caption layout ({error!r})") from error
    listing.entries = list(entries.values())
    return listing


def _read_token(file: Path) -> _Listing:
    return _read_numbered(file, _TOKEN_LINE, "NAME#i<TAB>caption")


def _read_numbered(file: Path, form: re.Pattern[str], shape: str, skip: int = 0) -> _Listing:
    """Lines of image name, caption number and caption; captions are sorted by number."""
    listing = _Listing(file, _flickr_name(file), [])
    found: dict[str, list[tuple[int, str]]] = {}
    for where, line in list(_read_lines(file))[skip:]:
        match = form.fullmatch(line) if line is not None else None
        if match is None:
            reason = "is not UTF-8" if line is None else f"is not {shape}"
            listing.faults.append(Rejection(where, reason))
        elif not _PICTURE.fullmatch(name := match[1].strip()):
            listing.faults.append(Rejection(name, f"is not the name of an image ({where})"))
        else:
            found.setdefault(name, []).append((int(match[2]), match[3]))
    for name, captions in found.items():
        captions.sort(key=lambda numbered: numbered[0])
        listing.entries.append(_Entry(name, [caption for _, caption in captions]))
    return listing


def _flickr_name(file: Path) -> str:
    return (
        "flickr30k" if file.name.startswith(("results", "flickr_annotations_30k")) else "flickr8k"
    )


def _read_table(file: Path) -> _Listing:
    header = next((line for _, line in _read_lines(file)), None)
    if header is None:
        raise DataError(f"{file}: has no header line; it needs the columns image and caption")
    if "|" in header:
        return _read_numbered(file, _PIPED_LINE, "NAME| number| caption", skip=1)
    is_flickr = file.name.startswith(("results", "flickr_annotations"))
    name = _flickr_name(file) if is_flickr else file.resolve().parent.name
    listing = _Listing(file, name, [])
    lines = list(_read_lines(file))
    listing.faults += [Rejection(where, "is not UTF-8") for where, line in lines if line is None]
    text = "\n".join(line for _, line in lines if line is not None)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    columns = {column.strip().lower(): column for column in rows.fieldnames or [] if column}
    image = next((columns[c] for c in _IMAGE_COLUMNS if c in columns), None)
    caption = next((columns[c] for c in _CAPTION_COLUMNS if c in columns), None)
    if image is None or caption is None:
        raise DataError(
            f"{file}: its columns are {', '.join(columns)}; it needs "
            f"one of {', '.join(_IMAGE_COLUMNS)} and one of {', '.join(_CAPTION_COLUMNS)}"
        )
    entries: dict[str, _Entry] = {}
    try:
        for row in rows:
            fields = {key: row[column] for key, column in columns.items()}
            entry = entries.setdefault(str(row[image]).strip(), _Entry(str(row[image]).strip()))
            entry.captions += _cell_captions(row[caption])
            entry.split = fields.get("split") or None
            entry.image_id = _number(fields.get("image_id"))
            entry.label = _number(fields.get("label"))
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: is not csv ({error})") from error
    listing.entries = list(entries.values())
    return listing


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


# --- Splits ---


def _split_lists(recipe: _Recipe, listings: list[_Listing]) -> dict[str, str]:
    """Split of each image's stem, from the split lists; empty where there are none."""
    if recipe.splits is not None:
        named = [
            (split, recipe.root / file) for split, files in recipe.splits.items() for file in files
        ]
    elif any(entry.split is not None for listing in listings for entry in listing.entries):
        return {}
    else:
        folders = dict.fromkeys((recipe.root, listings[0].file.parent))
        named = [
            (match[1].lower(), file)
            for folder in folders
            for file in sorted(folder.iterdir())
            if (match := _SPLIT_LIST.fullmatch(file.name))
        ]
    lists: dict[str, str] = {}
    for split, file in named:
        split = _SPLIT_NAMES.get(split, split)
        for where, line in _read_lines(file):
            stem = _stem(line.strip()) if line is not None else None
            if stem is not None and lists.setdefault(stem, split) != split:
                raise DataError(
                    f"{where}: {stem} is in {split} and in {lists[stem]}; "
                    "an image may be in one split"
                )
    return lists


def _stem(name: str) -> str:
    return re.sub(r"\.(?:jpe?g|png|webp)$", "", name, flags=re.IGNORECASE)


def _apply_splits(listing: _Listing, lists: dict[str, str]) -> int:
    """Give every entry its split, keep those that have one; how many have none."""
    kept, unlisted = [], 0
    for entry in listing.entries:
        split = lists.get(_stem(entry.name)) if lists else (entry.split or "train")
        if split is None:
            unlisted += 1
            continue
        entry.split = _SPLIT_NAMES.get(split, split) if isinstance(split, str) else ""
        kept.append(entry)
    listing.entries = kept
    return unlisted


def _undescribed(listings: list[_Listing], lists: dict[str, str]) -> list[Rejection]:
    """Images that a split list names and no caption file describes."""
    described = {_stem(entry.name) for listing in listings for entry in listing.entries}
    missing = (item for item in lists.items() if item[0] not in described)
    return [Rejection(_key(stem), "no caption", split) for stem, split in missing]


# --- Entries to records ---


def _resolve(
    recipe: _Recipe, listing: _Listing, records: list[Record], rejected: list[Rejection]
) -> None:
    folder = _image_folder(recipe, listing)
    seen = {record.key for record in records}
    for entry in listing.entries:
        split = entry.split or ""
        fault = _fault_of(entry, split)
        key = _key(entry.name)
        captions = []
        for place, caption in enumerate(entry.captions if fault is None else []):
            if reason := _caption_fault(caption):
                rejected.append(Rejection(f"{key}#{place}", reason, split))
            else:
                captions.append(caption.strip())
        if fault is None and not captions:
            fault = "no caption"
        if fault is None and key in seen:
            fault = "another image has this key"
        if fault is not None:
            rejected.append(Rejection(key, fault, split))
            continue
        seen.add(key)
        image = folder / entry.name
        name = recipe.name or listing.source
        records.append(
            Record(key, image, tuple(captions), split, name, entry.image_id, entry.label)
        )


def _image_folder(recipe: _Recipe, listing: _Listing) -> Path:
    candidates = recipe.images or listing.image_folders
    base = recipe.root
    names = [entry.name for entry in listing.entries if _is_inside(entry.name)]
    for candidate in candidates:
        inner = Path(candidate).name
        for folder in (base / candidate, base / candidate / inner, listing.file.parent / candidate):
            if folder.is_dir() and any((folder / name).is_file() for name in names):
                return folder
    raise DataError(
        f"{base}: none of the {len(names)} images that {listing.file.name} names lies in "
        f"{', '.join(candidates)}; put them there, or name "
        "their folder in a recipe (images: FOLDER)"
    )


def _is_inside(name: str) -> bool:
    """Whether a file name stays in its folder."""
    return (
        bool(name)
        and "\0" not in name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
    )


def _fault_of(entry: _Entry, split: str) -> str | None:
    if not _is_inside(entry.name):
        return "its file name leaves the folder of images"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        return f"split {split!r} is not a name"
    if len(_key(entry.name).encode(errors="replace")) > _KEY_BYTES:
        return f"its name is longer than {_KEY_BYTES} bytes"
    return None


def _caption_fault(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return "caption is not a text"
    if not caption.strip():
        return "empty caption"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "caption is not Unicode"
    return None


def _key(name: str) -> str:
    # Readers split at the first dot, lists at blanks.
    return re.sub(r"[./\\\s\x00-\x1f\x7f\ud800-\udfff]", "_", _stem(name))


def _with_sound_ids(records: list[Record]) -> list[Record]:
    """The source's own ids where every image has one of its own, else none."""
    own = {record.image_id for record in records}
    if None not in own and len(own) == len(records):
        return records
    return [replace(record, image_id=None) for record in records]
