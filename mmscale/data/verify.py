"""Packed folders looked at from outside: whatever is not as their manifest says, in a sentence."""

import io
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

from PIL import Image

from mmscale.data.choice import Choice
from mmscale.data.damage import DamagedShardError, reason_of
from mmscale.data.far import Far, at_hand, manifest_at
from mmscale.data.grouping import Identities, Trait, tell_apart
from mmscale.data.index import digest_of, trait_of
from mmscale.data.manifest import MANIFEST_NAME, Manifest, Shard, with_identities
from mmscale.data.members import describe_members
from mmscale.data.pool import map_ordered
from mmscale.data.remote import beside, is_listed, safe_url, split_place
from mmscale.data.tar import walk_shard
from mmscale.errors import DataError


def packed_folders(folder: Path | str) -> list[Path] | list[str]:
    """A packed folder itself, or those in it where it holds a folder a split."""
    if isinstance(folder, str):
        return _packed_elsewhere(folder)
    splits = sorted(path.parent for path in Path(folder).glob(f"*/{MANIFEST_NAME}"))
    return [folder] if (folder / MANIFEST_NAME).exists() or not splits else splits


def _packed_elsewhere(folder: str) -> list[str]:
    if not is_listed(folder):
        return [folder]
    with closing(Far()) as far:
        found = far.entries(folder)
        below = [f"{folder.rstrip('/')}/{name}" for name in sorted(found.folders)]
        if MANIFEST_NAME in found.files:
            return [folder]
        return [path for path in below if MANIFEST_NAME in far.entries(path).files] or [folder]


def verify_all(
    folder: Path | str,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Faults of every packed folder that `packed_folders` finds, one sentence each.

    Args:
        folder: A packed folder, or one that holds several; the address of one, too.
        workers: Processes that read shards.
        progress: Called with shards done and shards in all.
        note: Called with a line on what is no fault but should be known.
    """
    faults = []
    try:
        for packed in packed_folders(folder):
            try:
                faults += verify(packed, workers, progress, note)
            except DataError as error:
                faults.append(str(error))
    except DataError as error:
        # A store that does not tell what it holds.
        return [str(error)]
    return faults


def verify(
    folder: Path | str,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Faults of a packed folder against its manifest, one sentence each; empty when it is sound.

    Arguments as `verify_all`.

    Raises:
        DataError: There is no manifest that can be read.
    """
    manifest = manifest_at(folder)
    if not manifest.is_sealed:
        note(
            f"{safe_url(beside(folder, MANIFEST_NAME))}: is of a version without a digest of "
            "itself, so that a changed number in it may go unseen; mmscale index writes it anew"
        )
    folder = manifest.beside(folder)
    listed = {shard.name for shard in manifest.shards}
    faults = [
        f"{path}: is not in {MANIFEST_NAME}; remove it, or run mmscale index on the shards"
        for path in _tars_of(folder)
        if split_place(path)[1] not in listed
    ]
    traits: list[list[Trait]] = []
    check = partial(_check_shard, folder, Choice(manifest.keys))
    for done, found in enumerate(map_ordered(check, manifest.shards, workers), start=1):
        faults += found.faults
        traits.append(found.traits)
        if progress:
            progress(done, len(manifest.shards))
    settled = tell_apart([shard.name for shard in manifest.shards], traits)
    faults += [
        f"{safe_url(beside(folder, shard.name))}: sample {found[place].key} is in {owner} too"
        for shard, found, repeats in zip(manifest.shards, traits, settled.repeats, strict=True)
        for place, owner in repeats.items()
    ]
    return faults or _identity_faults(folder, manifest, settled.traits)


def _tars_of(folder: Path | str) -> list[Path] | list[str]:
    """The tars of a folder that tells what it holds."""
    if isinstance(folder, Path):
        return sorted(folder.glob("*.tar"))
    with closing(Far()) as far:
        return far.matching(f"{folder.rstrip('/')}/*.tar") if is_listed(folder) else []


def _identity_faults(
    folder: Path | str, manifest: Manifest, traits: list[list[Trait]]
) -> list[str]:
    """Shards whose samples are not those that the manifest takes them for."""
    true, _ = with_identities(manifest.shards, traits)
    return [
        f"{safe_url(beside(folder, shard.name))}: the manifest's identities are not those of its "
        "samples; write it again with mmscale index"
        for shard, actual in zip(manifest.shards, true, strict=True)
        if not _are(shard.identities, actual.identities)
    ]


def _are(claimed: Identities | None, true: Identities | None) -> bool:
    """Whether a manifest claims nothing or the truth; copies were not counted at first."""
    return claimed is None or (true is not None and replace(claimed, copies=true.copies) == true)


def image_fault(content: bytes) -> str | None:
    """Why an encoded image cannot be decoded."""
    try:
        with warnings.catch_warnings():
            # Also of what the header makes Pillow say.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
                image.load()
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make a decoder raise
        return f"cannot be decoded ({reason_of(error)})"
    return None


@dataclass
class _Found:
    """What one shard was found to hold.

    Attributes:
        choice: Which members of a sample were counted.
        faults: A line for each.
        listed: Key and number of captions of each sample that its manifest lists, by offset.
        traits: Of those of them that can be used.
        unlisted: How many samples the manifest does not list.
    """

    choice: Choice
    faults: list[str] = field(default_factory=list)
    listed: dict[int, tuple[str, int]] = field(default_factory=dict)
    traits: list[Trait] = field(default_factory=list)
    unlisted: int = 0


def _check_shard(folder: Path | str, choice: Choice, shard: Shard) -> _Found:
    found = _Found(choice)
    place = beside(folder, shard.name)
    path = safe_url(place)
    if isinstance(place, Path) and not place.is_file():
        found.faults.append(f"{path}: is missing, or not a file; restore it or pack again")
        return found
    try:
        with at_hand(place) as file:
            size, digest = digest_of(file)
            if size != shard.bytes:
                found.faults.append(f"{path}: has {size} bytes, the manifest says {shard.bytes}")
            if digest != shard.sha256:
                found.faults.append(f"{path}: sha256 is {digest}, the manifest says {shard.sha256}")
            listed = dict(zip(shard.offsets, shard.captions, strict=True))
            _check_samples(path, file, listed, found)
    except DataError as error:
        found.faults.append(str(error))
        return found
    except (OSError, DamagedShardError) as error:
        found.faults.append(f"{path}: {error}; restore it or pack again")
    _compare(path, shard, found)
    return found


def _check_samples(path: str, file: IO[bytes], listed: dict[int, int], found: _Found) -> None:
    seen: set[str] = set()
    for in_tar in walk_shard(file, found.choice.wanted):
        # What index left out is not in the manifest, so nobody reads it.
        if in_tar.offset not in listed:
            found.unlisted += 1
            continue
        sample = describe_members(in_tar, listed[in_tar.offset], found.choice)
        fault = "occurs twice" if sample.key in seen else sample.fault or image_fault(sample.image)
        seen.add(sample.key)
        if fault:
            found.faults.append(f"{path}: sample {sample.key} {fault}")
        else:
            found.traits.append(trait_of(sample))
        found.listed[in_tar.offset] = sample.key, len(sample.captions)


def _compare(path: str, shard: Shard, found: _Found) -> None:
    held = len(found.listed) + found.unlisted
    if held != shard.samples + shard.skipped:
        besides = f" and {shard.skipped} left out" if shard.skipped else ""
        found.faults.append(
            f"{path}: holds {held} samples, the manifest says {shard.samples}{besides}"
        )
        return
    for offset in sorted(set(shard.offsets) - found.listed.keys()):
        found.faults.append(f"{path}: no sample begins at byte {offset}, as the manifest says")
    claims = dict(zip(shard.offsets, shard.captions, strict=True))
    for offset, (key, count) in found.listed.items():
        if count != claims[offset]:
            found.faults.append(
                f"{path}: sample {key} has captions: {count}, the manifest says {claims[offset]}"
            )
