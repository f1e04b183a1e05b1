"""Shards of a setting as one set, whatever manifests they come from: whose image each sample is."""

import bisect
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from mmscale.data.grouping import Identities
from mmscale.data.manifest import Shard
from mmscale.data.unread import raw

Place: TypeAlias = Path | str


def place_of(path: Place) -> str:
    """Where a shard lies, equal however its path is spelt."""
    return os.path.realpath(path) if isinstance(path, Path) else path


@dataclass(frozen=True)
class ShardSet:
    """Shards and where they lie.

    Attributes:
        shards: Their manifests' records; none where they are read without a manifest.
        paths: A file, a URL or a command each.
        digest: Changes when any byte of any shard does.
        sources: How many of the shards each source has, in their order, and its weight.
        salts: For each shard, what the image ids in its tar are combined with, by exclusive or, to
            give the ids that count: an id says whose image it is within one manifest only. None
            where the ids count as they are, with a single manifest.
        labels_clash: Whether labels have names in one manifest and are bare numbers in another.
    """

    shards: tuple[Shard, ...]
    paths: tuple[Place, ...]
    digest: str
    sources: tuple[tuple[int, float], ...]
    salts: tuple[int, ...] = ()
    labels_clash: bool = False

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def starts(self) -> list[int]:
        """Place of each shard's first sample in the whole set, and the number of all samples."""
        return [0, *accumulate(shard.samples for shard in self.shards)]

    def sample_at(self, place: int) -> tuple[int, int]:
        """Shard and sample of a place in the whole set."""
        shard = bisect.bisect_right(self.starts, place) - 1
        return shard, place - self.starts[shard]

    @property
    def copies(self) -> int:
        """Images that have the bytes of another, as far as the manifests count them."""
        return sum(shard.identities.copies for shard in self.shards if shard.identities)

    @property
    def described(self) -> str:
        """Changes when the manifests count other samples, captions or ids in the same shards."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(raw(shard.captions) + b";")
            digest.update(b";" if shard.identities is None else raw(shard.identities.images))
        return digest.hexdigest()

    def image_id(self, shard: int, own: int) -> int:
        """The identity of an image whose tar says that it is `own`."""
        return own ^ self.salts[shard] if self.salts else own


@dataclass(frozen=True)
class Origin:
    """A manifest that shards come from.

    Attributes:
        digest: Of the shards that it lists: the same wherever it lies.
        classes: Names of its labels' numbers; empty where labels are numbers.
    """

    digest: str
    classes: tuple[str, ...]

    @property
    def salt(self) -> int:
        """63 bits that set its ids apart from those of others."""
        return int(self.digest[:16], 16) >> 1


def told_apart(shards: ShardSet, origins: Sequence[Origin]) -> ShardSet:
    """Shards of several manifests, with ids that no two of them share and one count of classes."""
    labelled = {
        origin.classes
        for origin, shard in zip(origins, shards.shards, strict=True)
        if shard.identities is not None and shard.identities.labels is not None
    }
    clash = () in labelled and len(labelled) > 1
    among = {name: number for number, name in enumerate(sorted(set().union(*labelled)))}
    classes = {
        origin: () if clash else tuple(among[name] for name in origin.classes if name in among)
        for origin in set(origins)
    }

    def known(own: Identities, origin: Origin) -> Identities:
        return (own ^ origin.salt).relabelled(classes[origin])

    records = tuple(
        shard
        if shard.identities is None
        else replace(shard, identities=known(shard.identities, origin))
        for shard, origin in zip(shards.shards, origins, strict=True)
    )
    digest = f"{shards.digest}:{','.join(origin.digest for origin in origins)}"
    salts = tuple(origin.salt for origin in origins)
    return replace(shards, shards=records, digest=digest, salts=salts, labels_clash=clash)
