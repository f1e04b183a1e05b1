"""Shards looked at from outside: the manifest of tars made elsewhere, the faults of packed ones."""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from mmscale.data.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest, write_manifest
from mmscale.data.members import image_of
from mmscale.data.pool import map_ordered
from mmscale.data.walk import DamagedShardError, FoundSample, walk_shard
from mmscale.errors import DataError


def verify(
    folder: Path, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Faults of a packed folder against its manifest, one sentence each; empty when it is sound.

    Raises:
        DataError: There is no manifest that can be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    listed = {shard.name for shard in manifest.shards}
    faults = [
        f"{path}: is not in {MANIFEST_NAME}; remove it, or run mmscale index on the shards"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]
    keys: dict[str, str] = {}
    check = partial(_check_shard, folder)
    for done, (shard, found) in enumerate(map_ordered(check, manifest.shards, workers), start=1):
        faults += found.faults
        for key in found.keys:
            if keys.setdefault(key, shard) != shard:
                faults.append(f"{folder / shard}: sample {key} is in {keys[key]} too")
        if progress:
            progress(done, len(manifest.shards))
    return faults


def index(
    shards: Iterable[Path],
    workers: int = 1,
    skipped: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the manifest of shards made elsewhere into their folder.

    Args:
        shards: Tars, all in one folder.
        workers: Processes that read them.
        skipped: Called with one line for each sample that cannot be used, which is then left out;
            without it such a sample is an error.
        progress: Called with shards done and shards in all.

    Raises:
        DataError: No shards, shards in several folders, a damaged one, or one without samples.
    """
    paths = sorted({Path(path) for path in shards})
    if not paths:
        raise DataError("no shard matches; name the tars, such as shards/*.tar")
    folder = paths[0].parent
    if other := next((path for path in paths if path.parent != folder), None):
        raise DataError(f"{other}: is not in {folder}; index the tars of one folder at a time")
    records = []
    for done, (shard, faults) in enumerate(map_ordered(describe_shard, paths, workers), start=1):
        if faults and skipped is None:
            raise DataError(f"{faults[0]}; mend or remove the sample")
        for fault in faults:
            assert skipped is not None, "checked above"
            skipped(fault)
        if shard.samples:
            records.append(shard)
        if progress:
            progress(done, len(paths))
    if not records:
        raise DataError(f"{folder}: no shard holds a sample with an image and a caption")
    manifest = Manifest(None, folder.resolve().name, tuple(records))
    write_manifest(folder, manifest)
    return manifest


def describe_shard(path: Path) -> tuple[Shard, list[str]]:
    """The manifest's record of a tar, and the samples that it leaves out.

    Raises:
        DataError: It is not a whole, uncompressed tar.
    """
    offsets, captions, faults = [], [], []
    seen: set[str] = set()
    try:
        for sample in walk_shard(path):
            fault = "its key occurs twice" if sample.key in seen else fault_of(sample)
            seen.add(sample.key)
            if fault:
                faults.append(f"{path}: sample {sample.key} {fault}")
                continue
            offsets.append(sample.offset)
            captions.append(len(sample.description.captions))
    except (OSError, DamagedShardError) as error:
        raise DataError(f"{path}: {error}; fetch or pack the shard again") from error
    size, digest = _digest(path)
    return Shard(path.name, size, digest, len(offsets), tuple(offsets), tuple(captions)), faults


def fault_of(sample: FoundSample) -> str | None:
    """What makes a sample useless, short of decoding its image."""
    if image_of(sample.members) is None:
        return "has no image"
    if len(set(sample.suffixes)) < len(sample.suffixes):
        return "has a member twice"
    return sample.description.fault


def image_fault(content: bytes) -> str | None:
    """Why an encoded image cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            image.load()
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make a decoder raise
        return f"cannot be decoded ({error})"
    return None


@dataclass
class _Found:
    """What one shard was found to hold."""

    faults: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)


def _check_shard(folder: Path, shard: Shard) -> tuple[str, _Found]:
    found = _Found()
    path = folder / shard.name
    if not path.is_file():
        found.faults.append(f"{path}: is missing; restore it or pack again")
        return shard.name, found
    try:
        size, digest = _digest(path)
        if size != shard.bytes:
            found.faults.append(f"{path}: has {size} bytes, the manifest says {shard.bytes}")
        if digest != shard.sha256:
            found.faults.append(f"{path}: sha256 is {digest}, the manifest says {shard.sha256}")
        _check_samples(path, set(shard.offsets), found)
    except (OSError, DamagedShardError) as error:
        found.faults.append(f"{path}: {error}")
    _compare(path, shard, found)
    return shard.name, found


def _check_samples(path: Path, listed: set[int], found: _Found) -> None:
    seen: set[str] = set()
    for sample in walk_shard(path):
        fault = "occurs twice" if sample.key in seen else fault_of(sample)
        seen.add(sample.key)
        # What index left out is not in the manifest, so nobody reads it.
        if fault and sample.offset not in listed:
            continue
        if fault is None and (image := image_of(sample.members)) is not None:
            fault = image_fault(image)
        if fault:
            found.faults.append(f"{path}: sample {sample.key} {fault}")
        found.keys.append(sample.key)
        found.offsets.append(sample.offset)
        found.captions.append(len(sample.description.captions))


def _compare(path: Path, shard: Shard, found: _Found) -> None:
    if len(found.offsets) != shard.samples:
        found.faults.append(
            f"{path}: holds {len(found.offsets)} samples, the manifest says {shard.samples}"
        )
        return
    for name, actual, claimed in (
        ("begins at byte", found.offsets, shard.offsets),
        ("has captions:", found.captions, shard.captions),
    ):
        for key, value, claim in zip(found.keys, actual, claimed, strict=True):
            if value != claim:
                found.faults.append(
                    f"{path}: sample {key} {name} {value}, the manifest says {claim}"
                )
                break


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
