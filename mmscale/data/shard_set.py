"""Shards of a setting as one set, whatever manifests they come from: whose image each sample is."""

import bisect
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

from mmscale.data.choice import USUAL, Choice
from mmscale.data.grouping import Identities
from mmscale.data.manifest import Shard
from mmscale.data.remote import is_pipe, safe_url
from mmscale.data.unread import raw
from mmscale.errors import ConfigError, DataError

Place: TypeAlias = Path | str
# Bytes from one place in a shard to another, in their order.
Stretches: TypeAlias = tuple[tuple[int, int], ...]
# Sizes are asked of a file server many at a time.
AT_ONCE = 16


def place_of(path: Place) -> str:
    """Where a shard lies, equal however its path is spelt."""
    return os.path.realpath(path) if isinstance(path, Path) else path


@dataclass(frozen=True)
class ShardSet:
    """Shards and where they lie.

    Attributes:
        shards: Their manifests' records; none where they are read without a manifest.
        paths: A file, a URL or a command each.
        digest: Changes when any byte of any shard does, or what is left out of them.
        sources: How many of the shards each source has, in their order, and its weight.
        salts: For each shard, what the image ids in its tar are combined with, by exclusive or, to
            give the ids that count: an id says whose image it is within one manifest only. None
            where the ids count as they are, with a single manifest.
        labels_clash: Whether labels have names in one manifest and are bare numbers in another.
        manifests: For each shard the digest of the manifest that lists it.
        choices: For each shard which members are what; none where that goes by their usual names.
        mask: Digest of the images that `data.mask` leaves out; empty where it leaves out none.
        left_out: For each shard, from where to where its bytes are left out, where shards are read
            without their records; none without a mask.
        counted: Images that a mask leaves of shards that are read without their records.
    """

    shards: tuple[Shard, ...]
    paths: tuple[Place, ...]
    digest: str
    sources: tuple[tuple[int, float], ...]
    salts: tuple[int, ...] = ()
    labels_clash: bool = False
    manifests: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()
    mask: str = ""
    left_out: tuple[Stretches, ...] = ()
    counted: int | None = None

    def choice(self, shard: int) -> Choice:
        """Which members of a shard are what."""
        return self.choices[shard] if self.choices else USUAL

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
        choice: Which members were counted.
    """

    digest: str
    classes: tuple[str, ...]
    choice: Choice = USUAL

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


def chosen(shards: ShardSet, choice: Choice) -> ShardSet:
    """Shards whose members are what a choice says, draws and all.

    Raises:
        DataError: Their manifests counted other members.
    """
    for number in range(len(shards.shards)):
        known = shards.choice(number)
        if known.names != choice.names:
            raise DataError(
                f"data.keys ({choice.keys.words}): the manifest of "
                f"{safe_url(shards.paths[number])} counts other members ({known.keys.words}); give "
                "data.keys as it was indexed, or run mmscale index with these --keys"
            )
    digest = f"{shards.digest}:{choice.keys.words}"
    return replace(shards, choices=(choice,) * len(shards.paths), digest=digest)


def require_each_once(setting: str, paths: Sequence[Place]) -> None:
    """Refuse a shard that is named more than once, however it is spelt."""
    seen: dict[str, Place] = {}
    for path in paths:
        if is_pipe(str(path)):
            # What a command writes may be something else each time.
            continue
        first = seen.setdefault(place_of(path), path)
        if first is not path:
            raise ConfigError(
                f"{setting}: {safe_url(path)} is named twice, first as {safe_url(first)}; name it "
                "once, and give its source a weight if it is to come more often"
            )


def require_sizes(picked: Sequence[tuple[Path, Shard]]) -> None:
    """Refuse files that are not there, or are not as long as their manifests say."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = [picked[start::AT_ONCE] for start in range(AT_ONCE)]
        for _ in pool.map(_check_part, parts):
            pass


def _check_part(picked: list[tuple[Path, Shard]]) -> None:
    for path, shard in picked:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{path}: the manifest lists it but it cannot be opened ({error.strerror}); "
                "restore the shard or pack again"
            ) from error
        if size != shard.bytes:
            raise DataError(
                f"{path}: {size} bytes, its manifest says {shard.bytes}; restore the shard or "
                "pack again (mmscale verify names every fault)"
            )
