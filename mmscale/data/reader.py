"""Samples out of shards by their place: one read a sample, nothing extracted to disk."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mmscale.data.choice import USUAL, Choice
from mmscale.data.damage import DamagedSampleError
from mmscale.data.lanes import Item
from mmscale.data.members import Sample, sample_of
from mmscale.data.remote import is_remote
from mmscale.data.shard_bytes import LocalShards, RemoteShards
from mmscale.data.shards import ShardSet
from mmscale.data.tar import sample_in
from mmscale.errors import DataError


@dataclass(frozen=True)
class Drawn(Item):
    """A turn whose sample has been read already, or the reason why it cannot be used."""

    content: Sample | str = ""


class SampleReader:
    """Reads samples by (shard, sample).

    Args:
        shards: Where they lie: files of this machine, or URLs.
        window: Samples that this process holds for shuffling; so many of remote shards are kept.
    """

    def __init__(self, shards: ShardSet, window: int = 0):
        self._set = shards
        self._local = LocalShards(shards.shards, shards.paths)
        self._is_remote = [is_remote(path) for path in shards.paths]
        self._remote = (
            RemoteShards(shards.shards, shards.paths, window) if any(self._is_remote) else None
        )

    def read(self, shard: int, sample: int) -> Sample:
        """The sample at a place.

        Raises:
            DamagedSampleError: What lies there is not a sample.
            DataError: The shard cannot be read at all.
        """
        store = self._remote if self._remote and self._is_remote[shard] else self._local
        content, record = store.sample(shard, sample), self._set.shards[shard]
        where, counted = f"{record.name} sample {sample}", record.captions[sample]
        found = parse_sample(content, where, counted, self._set.choice(shard))
        if len(found.captions) != record.captions[sample]:
            raise DamagedSampleError(
                f"{record.name} {found.key}: captions: {len(found.captions)}, its manifest says "
                f"{record.captions[sample]}; run mmscale index on the shards"
            )
        known = record.identities
        if known is None:
            return replace(found, image_id=self._set.image_id(shard, found.image_id))
        return replace(found, image_id=known.images[sample])

    def take(self, item: Item) -> Sample:
        """The sample whose turn it is.

        Raises:
            DamagedSampleError: It is not a sample.
            DataError: Its shard cannot be read at all.
        """
        if not isinstance(item, Drawn):
            return self.read(item.shard, item.sample)
        if isinstance(item.content, str):
            raise DamagedSampleError(item.content)
        return item.content

    def ahead(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; what lies behind a URL is fetched before its turn comes."""
        return self._remote.ahead(items, self._is_remote) if self._remote else items

    def close(self) -> None:
        """Free files and connections."""
        self._local.close()
        if self._remote:
            self._remote.close()


def parse_sample(
    content: bytes | io.RawIOBase,
    where: str,
    counted: int | None = None,
    choice: Choice = USUAL,
) -> Sample:
    """The sample that a piece of a tar begins with; the last two as in `describe_members`.

    Raises:
        DamagedSampleError: Not a tar, no image, no caption, or a wrong description.
        DataError: Its bytes cannot be read.
    """
    try:
        found = sample_in(content, choice.wanted)
    except DataError:
        raise
    except Exception as error:
        raise DamagedSampleError(f"{where}: not a tar member ({error})") from error
    if found is None:
        raise DamagedSampleError(f"{where}: holds no image, txt or json member")
    return sample_of(found, where, counted, choice)
