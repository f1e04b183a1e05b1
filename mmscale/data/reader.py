"""Samples out of shards by their place: one read a sample, nothing extracted to disk.

Only images, `.txt` and `.json` are looked at; every other member is passed over unread.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, cast

from webdataset.tariterators import base_plus_ext

from mmscale.data.complaints import tell_once
from mmscale.data.lanes import Item
from mmscale.data.members import IMAGE_SUFFIXES, describe_members, image_of, largest_member
from mmscale.data.remote import is_remote
from mmscale.data.shard_bytes import LocalShards, RemoteShards, Span
from mmscale.data.shards import ShardSet
from mmscale.data.walk import SoundHeader, plain_members
from mmscale.errors import DataError

# Of one sample; the rest of them is not looked at.
_MOST_MEMBERS = 10_000
_WANTED = (*IMAGE_SUFFIXES, "txt", "json")


class DamagedSampleError(Exception):
    """A sample that cannot be used; the stream puts another in its place."""


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard, undecoded, with its captions.

    Attributes:
        is_keyed: Whether the id was made from the key, because the sample brings none.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    image_id: int
    label: int = -1
    is_keyed: bool = False


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
        where = f"{record.name} sample {sample}"
        found = parse_sample(content, where, record.captions[sample])
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


def parse_sample(content: bytes | Span, where: str, counted: int | None = None) -> Sample:
    """A sample from its members' bytes; `counted` as in `describe_members`.

    Raises:
        DamagedSampleError: Not a tar, no image, no caption, or a wrong description.
        DataError: Its bytes cannot be read.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        for base, suffix, start, end in _members(content, file):
            if base is None or end - start > largest_member(suffix):
                continue
            if key is not None and base != key:
                break
            if suffix in members:
                raise DamagedSampleError(f"{where} {base}: has a member twice")
            file.seek(start)
            key, members[suffix] = base, file.read(end - start)
    except (DamagedSampleError, DataError):
        raise
    except Exception as error:
        raise DamagedSampleError(f"{where}: not a tar member ({error})") from error
    if key is None:
        raise DamagedSampleError(f"{where}: holds no image, txt or json member")
    return sample_of(key, members, where, counted)


def _members(content: bytes | Span, file: io.IOBase) -> Iterator[tuple[str | None, str, int, int]]:
    """Key, ending, start and end of each member; no key where it is of no use."""
    plain = plain_members(content) if isinstance(content, bytes) else None
    if plain is not None:
        for name, start, end in plain:
            yield *_key_and_ending(name), start, end
        return
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:", tarinfo=SoundHeader) as tar:
        for member in islice(tar, _MOST_MEMBERS):
            end = member.offset_data + member.size
            yield *wanted_name(member), member.offset_data, end


def wanted_name(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Key and ending of a member that samples are made of; no key for any other."""
    # A sparse member of a few bytes may unfold to any size.
    if not member.isreg() or member.issparse():
        return None, ""
    return _key_and_ending(member.name)


def _key_and_ending(name: str) -> tuple[str | None, str]:
    key, suffix = base_plus_ext(name)
    suffix = (suffix or "").lower()
    return (key, suffix) if suffix in _WANTED else (None, "")


def sample_of(
    key: str, members: dict[str, bytes], where: str, counted: int | None = None
) -> Sample:
    """A sample from the content of its members by ending; `counted` as in `describe_members`.

    Raises:
        DamagedSampleError: No image, no caption, or a wrong description.
    """
    image = image_of(members)
    if image is None:
        raise DamagedSampleError(f"{where} {key}: has no image")
    description = describe_members(key, members, counted)
    if description.fault:
        raise DamagedSampleError(f"{where} {key}: {description.fault}")
    if counted is None and description.lines > 1:
        tell_once(
            "lines",
            f"{where} {key}: its txt has several lines and is one caption; a manifest (mmscale "
            "index) lets each line be one",
        )
    # Names are numbered where a manifest is made; without one only numbers can be used.
    label = description.label if isinstance(description.label, int) else -1
    is_keyed = description.source is None
    return Sample(key, image, description.captions, description.image_id, label, is_keyed)
