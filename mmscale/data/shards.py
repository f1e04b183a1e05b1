"""Samples out of packed shards by their place: one read a sample, nothing extracted to disk.

Only images, `.txt` and `.json` are looked at; every other member is passed over unread.
"""

import glob
import io
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import braceexpand
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmscale.data.manifest import Shard, read_manifest
from mmscale.data.members import IMAGE_SUFFIXES, describe_members, image_of
from mmscale.errors import DataError

_OPEN_FILES = 64


class DamagedSampleError(Exception):
    """A sample that cannot be used; the stream puts another in its place."""


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard, undecoded, with its captions."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    image_id: int


@dataclass(frozen=True)
class ShardSet:
    """Shards and the folders that they lie in."""

    shards: tuple[Shard, ...]
    paths: tuple[Path, ...]
    digest: str

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)


def open_shards(setting: str, where: str | list[str]) -> ShardSet:
    """Find shards by a packed folder, or by globs and brace lists of tars beside their manifest.

    Args:
        setting: Name of the setting, for messages.
        where: Its value.

    Raises:
        DataError: No shard matches, or there is no manifest.
    """
    patterns = [where] if isinstance(where, str) else where
    picked: list[tuple[Path, Shard]] = []
    for pattern in patterns:
        picked += _match(setting, pattern)
    if not picked:
        raise DataError(
            f"{setting}={where}: no shard matches; name a folder that mmscale pack wrote"
        )
    for path, shard in picked:
        _check_size(path, shard)
    paths, shards = zip(*picked, strict=True)
    names = ",".join(shard.sha256 for shard in shards)
    return ShardSet(shards, paths, f"{len(patterns)}:{names}")


def _match(setting: str, pattern: str) -> list[tuple[Path, Shard]]:
    folder = Path(pattern)
    if folder.is_dir():
        manifest = read_manifest(folder)
        return [(folder / shard.name, shard) for shard in manifest.shards]
    parts = braceexpand.braceexpand(pattern)
    found = sorted({Path(path) for part in parts for path in glob.glob(part)})  # noqa: PTH207
    if not found:
        raise DataError(
            f"{setting}={pattern}: no shard matches; name a folder that mmscale pack wrote, or "
            "tars such as 'shards/train-{000000..000028}.tar'"
        )
    manifest = read_manifest(found[0].parent)
    listed = {shard.name: shard for shard in manifest.shards}
    unknown = [path for path in found if path.name not in listed or path.parent != found[0].parent]
    if unknown:
        raise DataError(
            f"{unknown[0]}: not in the manifest of {found[0].parent}; run mmscale index on "
            "the shards"
        )
    return [(path, listed[path.name]) for path in found]


def _check_size(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: the manifest lists it but it cannot be opened ({error.strerror}); "
            "restore the shard or pack again"
        ) from error
    if size != shard.bytes:
        raise DataError(
            f"{path}: {size} bytes, its manifest says {shard.bytes}; restore the shard or pack "
            "again (mmscale verify names every fault)"
        )


class SampleReader:
    """Reads samples by (shard, sample); keeps a bounded number of shards open."""

    def __init__(self, shards: ShardSet):
        self._set = shards
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, shard: int, sample: int) -> Sample:
        """The sample at a place.

        Raises:
            DamagedSampleError: What lies there is not a sample.
            DataError: The shard cannot be read at all.
        """
        offsets = self._set.shards[shard].offsets
        start = offsets[sample]
        end = offsets[sample + 1] if sample + 1 < len(offsets) else self._set.shards[shard].bytes
        path = self._set.paths[shard]
        try:
            file = self._open(shard, path)
            file.seek(start)
            content = file.read(end - start)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); restore the shard"
            ) from error
        return parse_sample(content, f"{path.name} sample {sample}")

    def _open(self, shard: int, path: Path) -> BinaryIO:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        file = path.open("rb")
        self._files[shard] = file
        return file


def parse_sample(content: bytes, where: str) -> Sample:
    """A sample from its members' bytes.

    Raises:
        DamagedSampleError: Not a tar, no image, no caption, or a wrong description.
    """
    try:
        files = tar_file_expander(
            [{"url": where, "stream": io.BytesIO(content)}], select_files=_wanted
        )
        members = next(group_by_keys(files), None)
    except Exception as error:
        raise DamagedSampleError(f"{where}: not a tar member ({error})") from error
    if members is None:
        raise DamagedSampleError(f"{where}: holds no image, txt or json member")
    key = str(members["__key__"])
    image = image_of(members)
    if image is None:
        raise DamagedSampleError(f"{where} {key}: has no image")
    description = describe_members(key, members)
    if description.fault:
        raise DamagedSampleError(f"{where} {key}: {description.fault}")
    return Sample(key, image, description.captions, description.image_id)


def _wanted(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in (*IMAGE_SUFFIXES, "txt", "json")
