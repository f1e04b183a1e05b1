"""Images with a class each: in shards whose samples carry `cls` or `label`, or a folder a class.

Shards need no manifest and no captions: their headers are looked at once, and an image is read
where it lies.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from mmscale.contracts import InputSpec
from mmscale.data.damage import DamagedSampleError, DamagedShardError
from mmscale.data.far import at_hand
from mmscale.data.manifest import MANIFEST_NAME, Shard, read_manifest
from mmscale.data.pixels import EvalTransform, decode, stack_rows
from mmscale.data.remote import is_remote
from mmscale.data.shard_bytes import LocalShards
from mmscale.data.shard_set import ShardSet
from mmscale.data.shards import list_shards
from mmscale.data.tar import (
    IMAGE_SUFFIXES,
    TEXT_BYTES,
    Member,
    sample_in,
    telling_damage,
    walk_members,
)
from mmscale.errors import DataError

_LABEL, _JSON = "cls", "json"
_LABEL_BYTES = 1000
_MOST_DIGITS = 10


@dataclass(frozen=True)
class LabelledImages:
    """Images of a set in their order.

    Attributes:
        labels: Class of each, its number in the list of classes.
        files: One an image, where they lie in folders; else none.
        shards: The tars, where they lie in shards.
    """

    labels: tuple[int, ...]
    files: tuple[Path, ...] = ()
    shards: ShardSet | None = None

    def name(self, place: int) -> str:
        """What an image is called in messages."""
        if self.shards is None:
            return str(self.files[place])
        shard, sample = self.shards.sample_at(place)
        return f"{self.shards.paths[shard]} sample {sample}"


@dataclass
class LabelledBatch:
    """Consecutive images. Those that cannot be decoded are named and leave no row.

    Attributes:
        pixels: [m c h w] bytes; None where every image is damaged.
        places: Place of each decoded image in the whole set.
        damaged: One line for each image that could not be decoded.
    """

    pixels: Tensor | None = None
    places: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class LabelledBatches(Dataset):
    """Batch j holds the images `places[j * size : (j + 1) * size]`, decoded for evaluation."""

    def __init__(self, images: LabelledImages, spec: InputSpec, places: range, size: int):
        self._images, self._places, self._size = images, places, size
        self._transform = EvalTransform(spec)
        self._shards: LocalShards | None = None

    def __len__(self) -> int:
        return -(-len(self._places) // self._size)

    def __getitem__(self, index: int) -> LabelledBatch:
        if index >= len(self):
            raise IndexError(index)
        batch, pixels = LabelledBatch(), []
        for place in self._places[index * self._size : (index + 1) * self._size]:
            try:
                name = self._images.name(place)
                pixels.append(self._transform(decode(self._content(place), name)))
            except DamagedSampleError as error:
                batch.damaged.append(str(error))
                continue
            batch.places.append(place)
        if pixels:
            batch.pixels = stack_rows(pixels)
        return batch

    def _content(self, place: int) -> bytes:
        """An encoded image."""
        if (shards := self._images.shards) is None:
            try:
                return self._images.files[place].read_bytes()
            except OSError as error:
                raise DamagedSampleError(f"{self._images.files[place]}: {error}") from error
        self._shards = self._shards or LocalShards(shards.shards, shards.paths)
        found = sample_in(self._shards.sample(*shards.sample_at(place)))
        members = found.members if found else {}
        return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), b"")


def open_labelled(
    setting: str, where: str | list[str], classes: Sequence[str], listed: str
) -> LabelledImages:
    """Find the images of a set and their classes.

    Args:
        setting: Name of the setting, for messages.
        where: Its value: tars, a folder of them, or a folder with a folder for each class.
        classes: Names in their order; a label is one of them, or the number of one.
        listed: Where they stand, for messages.

    Raises:
        DataError: There are none, or one has no label or another than these.
    """
    patterns = [where] if isinstance(where, str) else where
    if remote := next((pattern for pattern in patterns if is_remote(pattern)), None):
        raise DataError(f"{setting}={remote}: labelled images are read from this machine; fetch it")
    numbers = _Numbers(setting, tuple(classes), listed)
    if len(patterns) == 1 and _is_folder_a_class(Path(patterns[0])):
        return _in_folders(setting, Path(patterns[0]), numbers)
    paths = [Path(path) for path in list_shards(setting, where).paths]
    names = {folder: _names_in(folder) for folder in {path.parent for path in paths}}
    shards, labels = [], []
    for path in paths:
        offsets = []
        for key, offset, label in _labels_in(setting, path):
            known = names[path.parent]
            told = known[label] if isinstance(label, int) and 0 <= label < len(known) else label
            labels.append(numbers.of(told, f"{path} sample {key}", known))
            offsets.append(offset)
        size = path.stat().st_size
        counts = (0,) * len(offsets)
        shards.append(Shard(path.name, size, "", len(offsets), tuple(offsets), counts))
    if not labels:
        raise DataError(f"{setting}={where}: holds no image; name shards that do")
    found = ShardSet(tuple(shards), tuple(paths), "", ((len(paths), 1.0),))
    return LabelledImages(tuple(labels), shards=found)


@dataclass(frozen=True)
class _Numbers:
    """The list of classes, and what in a set's data stands for which."""

    setting: str
    classes: tuple[str, ...]
    listed: str

    def of(self, label: int | str, where: str, known: Sequence[str] = ()) -> int:
        """The number of a label.

        Args:
            label: A number or a name.
            where: Whose it is.
            known: Names of all classes of the data, if it says them, in its order: where none of
                them is in the list, the two have one order.

        Raises:
            DataError: The list does not have it.
        """
        if isinstance(label, str) and self.classes.count(label) == 1:
            return self.classes.index(label)
        is_number = isinstance(label, int) or (label.isdecimal() and len(label) < _MOST_DIGITS)
        if is_number and 0 <= int(label) < len(self.classes) and label not in known:
            return int(label)
        if label in known and len(known) == len(self.classes) and not {*known} & {*self.classes}:
            return known.index(str(label))
        raise DataError(
            f"{self.setting}: {where} has the label {label}, which is none of the "
            f"{len(self.classes)} classes of {self.listed}; list every class of the data"
        )


def _is_folder_a_class(root: Path) -> bool:
    """Whether a folder holds no shards but folders."""
    try:
        entries = list(root.iterdir()) if root.is_dir() else []
    except OSError:
        return False
    has_shards = any(entry.suffix == ".tar" or entry.name == MANIFEST_NAME for entry in entries)
    return not has_shards and any(entry.is_dir() for entry in entries)


def _in_folders(setting: str, root: Path, numbers: _Numbers) -> LabelledImages:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    known = [folder.name for folder in folders]
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        number = numbers.of(folder.name, f"the folder {folder}", known)
        own = sorted(p for p in folder.rglob("*") if p.suffix[1:].lower() in IMAGE_SUFFIXES)
        files += own
        labels += [number] * len(own)
    if not files:
        raise DataError(
            f"{setting}={root}: its folders hold no image ({', '.join(IMAGE_SUFFIXES)}); name a "
            "folder with a folder of images for each class"
        )
    return LabelledImages(tuple(labels), tuple(files))


def _names_in(folder: Path) -> tuple[str, ...]:
    """Names of the numbers that `mmscale pack` put in the place of labels that had names."""
    if not (folder / MANIFEST_NAME).is_file():
        return ()
    manifest = read_manifest(folder, lazily=True)
    return manifest.classes if manifest.settings is not None else ()


def _labels_in(setting: str, path: Path) -> Iterator[tuple[str, int, int | str]]:
    """Key, place and label of each sample of a tar; raises DataError where one has none."""
    key: str | None = None
    offset = 0
    suffixes: set[str] = set()
    said: dict[str, bytes] = {}

    def sample() -> tuple[str, int, int | str]:
        where = f"{setting}: {path} sample {key}"
        if not suffixes & set(IMAGE_SUFFIXES):
            raise DataError(f"{where} has no image; leave it out of the shard")
        label = _label(said)
        if label is None:
            raise DataError(
                f"{where} has no label; a sample says its class in KEY.cls, or as `label` or `cls` "
                "in KEY.json"
            )
        assert key is not None, "a sample has one"
        return key, offset, label

    try:
        with at_hand(path) as file:
            for member in walk_members(file):
                if member.key is None:
                    continue
                if member.key != key:
                    if key is not None:
                        yield sample()
                    key, offset, suffixes, said = member.key, member.offset, set(), {}
                suffixes.add(member.suffix)
                if member.suffix in (_LABEL, _JSON) and member.size <= _most(member):
                    with telling_damage():
                        said[member.suffix] = member.read()
        if key is not None:
            yield sample()
    except (OSError, DamagedShardError) as error:
        raise DataError(f"{path}: {error}; fetch or pack the shard again") from error


def _most(member: Member) -> int:
    return _LABEL_BYTES if member.suffix == _LABEL else TEXT_BYTES


def _label(said: dict[str, bytes]) -> int | str | None:
    """A class's number or name, as json or `.cls` says it."""
    values: list[object] = []
    if _JSON in said:
        try:
            fields = json.loads(said[_JSON])
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict):
            values += [fields.get("label"), fields.get(_LABEL)]
    if _LABEL in said:
        values.append(said[_LABEL].decode(errors="replace"))
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None
