"""Manifests of tars that are there already: what each holds, and what in it nobody can use."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mmscale.data.grouping import Trait, group_of, joints_of
from mmscale.data.manifest import Manifest, Shard, read_manifest, with_identities, write_manifest
from mmscale.data.members import image_of
from mmscale.data.pool import map_ordered
from mmscale.data.walk import DamagedShardError, FoundSample, walk_shard
from mmscale.errors import DataError


@dataclass(frozen=True)
class Described:
    """What a tar was found to hold.

    Attributes:
        shard: The manifest's record of it, without identities.
        keys: Key of each of its samples.
        traits: What its samples are joined by.
        faults: A line for each sample that cannot be used and is left out.
    """

    shard: Shard
    keys: tuple[str, ...]
    traits: tuple[Trait, ...]
    faults: tuple[str, ...]


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
        skipped: Called with one line for each sample that cannot be used and is left out.
        progress: Called with shards done and shards in all.

    Raises:
        DataError: No shards, shards in several folders, damaged ones, or none with a sample.
    """
    paths = sorted({Path(path) for path in shards})
    if not paths:
        raise DataError("no shard matches; name the tars, such as shards/*.tar")
    folder = paths[0].parent
    if other := next((path for path in paths if path.parent != folder), None):
        raise DataError(f"{other}: is not in {folder}; index the tars of one folder at a time")
    found, damaged = [], []
    owners: dict[str, str] = {}
    for done, described in enumerate(map_ordered(_describe, paths, workers), start=1):
        if isinstance(described, str):
            damaged.append(described)
        else:
            own = _without_keys(described, owners)
            owners |= dict.fromkeys(own.keys, own.shard.name)
            found.append(own)
            if skipped:
                for fault in own.faults:
                    skipped(fault)
        if progress:
            progress(done, len(paths))
    if damaged:
        more = f" ({len(damaged) - 1} more shards like it)" if len(damaged) > 1 else ""
        raise DataError(f"{damaged[0]}{more}")
    records = [described.shard for described in found]
    if not any(record.samples for record in records):
        raise DataError(f"{folder}: no shard holds a sample with an image and a caption")
    known = _as_it_was(folder, records) or Manifest(None, folder.resolve().name, ())
    identified, names = with_identities(records, [described.traits for described in found])
    manifest = replace(known, shards=identified, classes=names or known.classes)
    write_manifest(folder, manifest)
    return manifest


def _as_it_was(folder: Path, shards: list[Shard]) -> Manifest | None:
    """The manifest that the folder has, if it is of these very shards."""
    try:
        manifest = read_manifest(folder)
    except DataError:
        return None
    same = [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in shards]
    return manifest if same else None


def _describe(path: Path) -> Described | str:
    """As `describe_shard`; what is wrong with a damaged one, so that all of them are named."""
    try:
        return describe_shard(path)
    except DataError as error:
        return str(error)


def describe_shard(path: Path) -> Described:
    """Look at every sample of a tar, short of decoding its image.

    Raises:
        DataError: It is not a whole, uncompressed tar.
    """
    good: list[FoundSample] = []
    traits, captions, faults = [], [], []
    seen: set[str] = set()
    try:
        for sample in walk_shard(path):
            fault = "its key occurs twice" if sample.key in seen else fault_of(sample)
            seen.add(sample.key)
            if fault:
                faults.append(f"{path}: sample {sample.key} {fault}")
                continue
            captions.append(len(sample.description.captions))
            traits.append(trait_of(sample))
            sample.members.clear()
            good.append(sample)
        size, digest = digest_of(path)
    except (OSError, DamagedShardError) as error:
        raise DataError(f"{path}: {error}; fetch or pack the shard again") from error
    offsets = tuple(sample.offset for sample in good)
    shard = Shard(path.name, size, digest, len(good), offsets, tuple(captions), skipped=len(faults))
    return Described(shard, tuple(sample.key for sample in good), tuple(traits), tuple(faults))


def _without_keys(described: Described, owners: dict[str, str]) -> Described:
    """Without the samples whose key a shard before has: whose image they are, nobody could tell."""
    shard, keys = described.shard, described.keys
    twice = [place for place, key in enumerate(keys) if key in owners]
    if not twice:
        return described
    kept = sorted(set(range(len(keys))) - set(twice))
    faults = [f"{shard.name}: sample {keys[p]} its key is in {owners[keys[p]]} too" for p in twice]
    return Described(
        replace(
            shard,
            samples=len(kept),
            offsets=tuple(shard.offsets[place] for place in kept),
            captions=tuple(shard.captions[place] for place in kept),
            skipped=shard.skipped + len(twice),
        ),
        tuple(keys[place] for place in kept),
        tuple(described.traits[place] for place in kept),
        (*described.faults, *faults),
    )


def trait_of(sample: FoundSample) -> Trait:
    """What a sample without faults is joined by."""
    description, image = sample.description, image_of(sample.members)
    assert image is not None, "a sample without faults has an image"
    group = None if description.group is None else group_of(description.group)
    joints = joints_of(image, description.captions)
    return Trait(description.image_id, joints, group, description.label)


def fault_of(sample: FoundSample) -> str | None:
    """What makes a sample useless, short of decoding its image."""
    if image_of(sample.members) is None:
        return "has no image"
    if len(set(sample.suffixes)) < len(sample.suffixes):
        return "has a member twice"
    return sample.description.fault


def digest_of(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
