"""Images that training leaves out: a file of ids, and what is left of the shards without them.

An id counts in the manifest that lists it, whatever other sources a run has.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmscale.data.grouping import require_identities
from mmscale.data.manifest import Shard
from mmscale.data.remote import safe_url
from mmscale.data.shard_set import ShardSet, Stretches, place_of
from mmscale.errors import DataError
from mmscale.outputs import replace_file

_MASKED = "masked"
_FORM = f'write a JSON list of ids, {{"{_MASKED}": {{MANIFEST_DIGEST: [ids]}}}}, or an id a line'


@dataclass(frozen=True)
class Mask:
    """Ids of images to leave out.

    Attributes:
        place: Its file.
        anywhere: Ids that count in every manifest.
        within: Ids that count in one manifest, by its digest.
    """

    place: str
    anywhere: frozenset[int]
    within: Mapping[str, frozenset[int]]

    def of(self, manifest: str) -> frozenset[int]:
        """The ids that count in a manifest."""
        return self.anywhere | self.within.get(manifest, frozenset())


def read_mask(place: str) -> Mask:
    """The mask in a file: JSON or, where it begins with neither bracket, an id a line.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        text = Path(place).read_bytes().decode("utf-8-sig")
        parsed = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.split()
        if isinstance(parsed, dict):
            within = parsed[_MASKED]
            return Mask(place, frozenset(), {name: _ids(within[name]) for name in dict(within)})
        return Mask(place, _ids(parsed), {})
    except OSError as error:
        raise DataError(f"data.mask={place}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"data.mask={place}: is no mask ({error}); {_FORM}") from error


def write_mask(path: Path, masked: Mapping[str, Iterable[int]]) -> None:
    """Write a mask in one step.

    Args:
        path: The file.
        masked: Ids, as the manifest has them, by the manifest's digest.
    """
    content = {_MASKED: {digest: sorted(set(ids)) for digest, ids in masked.items()}}
    replace_file(path, json.dumps(content).encode())


def _ids(values: Any) -> frozenset[int]:
    found = set()
    for value in values if isinstance(values, list) else [values]:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{str(value)[:60]!r} is not an image's id")
        found.add(number)
    return frozenset(found)


@dataclass(frozen=True)
class _Rest(Shard):
    """What is left of a shard; what is left out lies between its samples."""

    ends: tuple[int, ...] = ()

    def end_of(self, sample: int) -> int:
        return self.ends[sample]

    @property
    def sample_bytes(self) -> int:
        return sum(self.ends) - sum(self.offsets)


def masked(shards: ShardSet, mask: Mask, tell: Callable[[str], None]) -> ShardSet:
    """Shards without the images of a mask, as if they had been packed without them.

    Args:
        shards: Those of `data.train`.
        mask: Ids that no manifest lists are told.
        tell: Takes a line.

    Raises:
        DataError: A manifest holds no ids, none of the mask's is there, or nothing is left.
    """
    known = require_identities("data.mask", [shard.identities for shard in shards.shards])
    found: list[frozenset[int]] = []
    records, left_out = [], []
    for number, (shard, identities) in enumerate(zip(shards.shards, known, strict=True)):
        wanted, salt = mask.of(shards.manifests[number]), shards.salts[number : number + 1]
        own = [image ^ salt[0] for image in identities.images] if salt else identities.images
        kept = [image not in wanted for image in own]
        found.append(wanted.intersection(own))
        records.append(shard if all(kept) else _rest(shard, kept))
        left_out.append(_stretches(shard, kept))
    touched = {name for name, ids in zip(shards.manifests, found, strict=True) if ids}
    left = sum(shard.samples for shard in records)
    _require_sense(mask, shards, left, found)
    tell(
        f"data.mask={mask.place}: leaves out {shards.samples - left:,} of the {shards.samples:,} "
        f"images of data.train{_unknown(mask, shards, found)}"
    )
    if not touched:
        return shards
    digest = hashlib.sha256(json.dumps([sorted(ids) for ids in found]).encode()).hexdigest()
    return replace(
        shards,
        shards=tuple(
            _without_copies(shard) if name in touched else shard
            for name, shard in zip(shards.manifests, records, strict=True)
        ),
        digest=f"{shards.digest}:without {digest}",
        mask=digest,
        left_out=tuple(left_out),
    )


def _rest(shard: Shard, kept: Sequence[bool]) -> Shard:
    ends = tuple(shard.end_of(sample) for sample, is_kept in enumerate(kept) if is_kept)
    return _Rest(**vars(shard.only(kept)), ends=ends)


def _stretches(shard: Shard, kept: Sequence[bool]) -> Stretches:
    """Where the bytes are of samples that are not kept."""
    return tuple(
        (shard.offsets[sample], shard.end_of(sample))
        for sample, is_kept in enumerate(kept)
        if not is_kept
    )


def _without_copies(shard: Shard) -> Shard:
    """A count of copies may be of copies of what is left out, in this shard or another."""
    assert shard.identities is not None, "a mask is of ids"
    return replace(shard, identities=replace(shard.identities, copies=0))


def _unknown(mask: Mask, shards: ShardSet, found: Sequence[frozenset[int]]) -> str:
    """What to tell of ids that are nobody's."""
    by_manifest: dict[str, set[int]] = {}
    for name, ids in zip(shards.manifests, found, strict=True):
        by_manifest.setdefault(name, set()).update(ids)
    missing = len(mask.anywhere.difference(*by_manifest.values()))
    missing += sum(len(ids - by_manifest.get(name, set())) for name, ids in mask.within.items())
    return f"; {missing:,} of its ids are of no image there" if missing else ""


def _require_sense(
    mask: Mask, shards: ShardSet, left: int, found: Sequence[frozenset[int]]
) -> None:
    count = len(mask.anywhere) + sum(map(len, mask.within.values()))
    if count and not any(found):
        raise DataError(
            f"data.mask={mask.place}: none of its {count:,} ids is of an image of data.train; name "
            "the mask of these shards (an id is what their manifest has, and a digest is that of "
            "the manifest)"
        )
    if not left:
        raise DataError(
            f"data.mask={mask.place}: leaves no image of data.train's {shards.samples:,}; name "
            "fewer ids"
        )


def unrecorded(listed: ShardSet, known: ShardSet) -> ShardSet:
    """Shards that are read without their records, with what a mask leaves out of them.

    Args:
        listed: The shards.
        known: The same as their manifests list them, masked.

    Raises:
        DataError: A shard is in no manifest, so that nothing tells whose its images are.
    """
    stretches = known.left_out or ((),) * len(known.paths)
    by_place = dict(
        zip(map(place_of, known.paths), zip(stretches, known.shards, strict=True), strict=True)
    )
    for path in listed.paths:
        if place_of(path) not in by_place:
            raise DataError(
                f"data.mask: {safe_url(path)} is in no manifest, so that nothing tells the ids of "
                "its images; run mmscale index on the shards"
            )
    found = [by_place[place_of(path)] for path in listed.paths]
    return replace(
        listed,
        digest=f"{listed.digest}:without {known.mask}" if known.mask else listed.digest,
        mask=known.mask,
        left_out=tuple(left_out for left_out, _ in found),
        counted=sum(shard.samples for _, shard in found),
    )


def is_within(stretches: Stretches, place: int) -> bool:
    """Whether a byte of a shard is one of those that are left out."""
    before = bisect_right(stretches, place, key=lambda stretch: stretch[0]) - 1
    return before >= 0 and place < stretches[before][1]
