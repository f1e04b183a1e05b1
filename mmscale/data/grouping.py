"""Which images count as one: the same content, the same caption in other dress, or a user's group.

Samples' traits are read where a manifest is made; joined over a whole folder they become the
identities that the stream hands on. Tools number samples anew in every shard, and an id made from a
key is then that of many images: `tell_apart` tells them apart, for manifests and for their checks.
"""

import hashlib
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import compress
from typing import Any

import numpy as np

from mmscale.data.members import image_id_of
from mmscale.data.unread import Counts, mapped
from mmscale.errors import DataError


@dataclass(frozen=True)
class Trait:
    """What tells a sample from others or joins it to them.

    Attributes:
        image: Image id.
        joints: Digests of the image's bytes and of each normalised caption; samples that share
            one are joined.
        group: The user's group, hashed; None without one.
        label: Class, a number or a name; None without one.
        key: The sample's name.
        source: What its json calls the set in which its own id counts; None where the id was made
            from the key.
    """

    image: int
    joints: tuple[int, ...]
    group: int | None
    label: int | str | None
    key: str = ""
    source: str | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Trait":
        """Read back from JSON that this program wrote."""
        return cls(**{**fields, "joints": tuple(fields["joints"])})


@dataclass(frozen=True)
class Identities:
    """Whose image each sample of a shard is; one entry a sample.

    Attributes:
        images: Image ids.
        captions: One id for all images that share content or a normalised caption, over the whole
            folder: the smallest image id among them.
        groups: The user's groups, the image's id where a sample has none; None without any.
        labels: Classes, -1 where a sample has none; None without any.
        copies: Samples whose image has the bytes of another image before it in the folder.
    """

    images: Counts
    captions: Counts
    groups: Counts | None
    labels: Counts | None
    copies: int = 0

    def __xor__(self, salt: int) -> "Identities":
        """The same with every id combined with `salt`, by exclusive or: the ids of one source."""
        change = partial(_salted, salt)
        groups = None if self.groups is None else mapped(self.groups, change)
        images, captions = mapped(self.images, change), mapped(self.captions, change)
        return replace(self, images=images, captions=captions, groups=groups)

    def only(self, kept: Sequence[bool]) -> "Identities":
        """Those of the samples that are `kept`; which of them are copies nothing tells."""

        def left(values: Counts) -> tuple[int, ...]:
            return tuple(compress(values, kept))

        return Identities(
            left(self.images),
            left(self.captions),
            None if self.groups is None else left(self.groups),
            None if self.labels is None else left(self.labels),
        )

    def relabelled(self, numbers: Sequence[int]) -> "Identities":
        """The same with `numbers` in place of the classes 0, 1 and so on; none: as they are."""
        if self.labels is None or not numbers:
            return self
        return replace(self, labels=mapped(self.labels, partial(_renumbered, numbers)))


@dataclass(frozen=True)
class Marks:
    """What manifests know of samples that their tars cannot tell; lists by shard.

    Attributes:
        match: Match id of each sample; None where its image id is it.
        labels: Class of each sample; None for a shard without any.
    """

    match: Sequence[Sequence[int]] | None = None
    labels: Sequence[Sequence[int] | None] = ()

    def match_id(self, shard: int, sample: int, image_id: int) -> int:
        """What defines a row's positives."""
        return image_id if self.match is None else self.match[shard][sample]

    def label(self, shard: int, sample: int, own: int = -1) -> int:
        """A row's class, -1 without one; `own` is what the sample says where no manifest is."""
        if not self.labels:
            return own
        labels = self.labels[shard]
        return -1 if labels is None else labels[sample]


def read_marks(match: str, shards: Sequence[Identities | None]) -> Marks:
    """The marks of `data.train`'s shards.

    Args:
        match: `image`, `caption` or `group`.
        shards: What their manifests say.

    Raises:
        DataError: They do not say what `match` needs.
    """
    labels = [None if known is None else known.labels for known in shards]
    if match == "image":
        return Marks(None, labels)
    known = require_identities(f"data.match={match}", shards)
    if match == "caption":
        return Marks([part.captions for part in known], labels)
    if all(part.groups is None for part in known):
        raise DataError(
            "data.match=group, but no image of data.train has a group; give its table a column "
            "`group` and pack it again, or run mmscale index on shards whose KEY.json has `group`"
        )
    return Marks([part.images if part.groups is None else part.groups for part in known], labels)


def require_identities(setting: str, shards: Sequence[Identities | None]) -> list[Identities]:
    """What manifests say about identities.

    Raises:
        DataError: One of them says nothing.
    """
    known = [part for part in shards if part is not None]
    if len(known) < len(shards):
        raise DataError(
            f"{setting} needs the images' identities, which the manifest of data.train does not "
            "hold; write it again with `mmscale index SHARDS...`"
        )
    return known


def joints_of(image: bytes, captions: Sequence[str]) -> tuple[int, ...]:
    """Digests of a sample's image bytes and of its captions, each once."""
    texts = {normal_caption(caption).encode(errors="surrogatepass") for caption in captions}
    return (_digest(b"image", image), *sorted(_digest(b"caption", text) for text in texts))


def copies_line(where: str, copies: int, samples: int) -> str | None:
    """What to tell of images whose bytes another image has; None where there are none.

    Args:
        where: The folder, or the setting with its value.
        copies: How many they are.
        samples: Images in all.
    """
    if not copies:
        return None
    return (
        f"{where}: {copies:,} of {samples:,} images have the bytes of another; the caption of a "
        "copy is a negative in training unless data.match=caption, and in evaluation copies tie, "
        "which lowers the recall: give an image all its captions under one key"
    )


def group_of(name: int | str) -> int:
    """A user's group as an id that no image has."""
    return _digest(b"group", str(name).encode(errors="surrogatepass"))


def normal_caption(caption: str) -> str:
    """What two captions share that differ only in case, punctuation, spaces or Unicode's forms."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    words = " ".join(folded.translate(_punctuation()).split())
    # A caption of nothing but punctuation is like itself only.
    return words or caption.strip()


def join(traits: Sequence[Sequence[Trait]]) -> tuple[list[Identities], tuple[str, ...]]:
    """The identities of a folder's shards from each shard's traits.

    Returns:
        One record a shard; the names of classes in the order of their numbers, none where labels
        are numbers already.
    """
    everyone = [trait for part in traits for trait in part]
    least = _least(everyone)
    has_groups = any(trait.group is not None for trait in everyone)
    has_labels = any(trait.label is not None for trait in everyone)
    names = _class_names(everyone)
    numbers = {name: number for number, name in enumerate(names)}
    # Whose bytes an image has, where another had them before.
    first: dict[int, int] = {}
    identities, start = [], 0
    for part in traits:
        groups = [trait.image if trait.group is None else trait.group for trait in part]
        labels = [
            -1 if label is None else numbers[str(label)] if names else int(label)
            for label in (trait.label for trait in part)
        ]
        identities.append(
            Identities(
                tuple(trait.image for trait in part),
                tuple(least[start : start + len(part)]),
                tuple(groups) if has_groups else None,
                tuple(labels) if has_labels else None,
                _copies(part, first),
            )
        )
        start += len(part)
    return identities, names


def _renumbered(numbers: Sequence[int], labels: tuple[int, ...]) -> tuple[int, ...]:
    if max(labels, default=-1) >= len(numbers):
        raise DataError(
            f"a manifest has the label {max(labels)} but names {len(numbers)} classes; write it "
            "again with mmscale index"
        )
    return tuple(-1 if label < 0 else numbers[label] for label in labels)


def _salted(salt: int, ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value ^ salt for value in ids)


def _copies(traits: Sequence[Trait], first: dict[int, int]) -> int:
    """How many images have the bytes of another that came before."""
    return sum(
        first.setdefault(trait.joints[0], trait.image) != trait.image
        for trait in traits
        if trait.joints
    )


def _class_names(traits: Sequence[Trait]) -> tuple[str, ...]:
    labels = {trait.label for trait in traits} - {None}
    if all(isinstance(label, int) for label in labels):
        return ()
    return tuple(sorted(map(str, labels)))


def _least(traits: Sequence[Trait]) -> list[int]:
    """The smallest image id among all samples that are linked by joints or by their image id."""
    images = np.array([trait.image for trait in traits], np.int64)
    owners = np.repeat(np.arange(len(traits)), [len(trait.joints) + 1 for trait in traits])
    every_link = [link for trait in traits for link in (trait.image, *trait.joints)]
    links = np.unique(np.array(every_link, np.int64), return_inverse=True)[1]
    # Samples stand by the order of their image ids, so that the first of a component is the least.
    order = np.argsort(images, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    owners, root = rank[owners], np.arange(len(images))
    while True:
        before = root.copy()
        first = np.full(links.max(initial=-1) + 1, len(images))
        np.minimum.at(first, links, root[owners])
        # Roots move with the samples that hang on them, so that a long chain shrinks by halves.
        np.minimum.at(root, root[owners], first[links])
        np.minimum.at(root, owners, first[links])
        root = root[root]
        if np.array_equal(root, before):
            return images[order][root][rank].tolist()


@cache
def _punctuation() -> dict[int, str]:
    return {
        code: " "
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)).startswith("P")
    }


def _digest(kind: bytes, content: bytes) -> int:
    """63 bits."""
    digest = hashlib.blake2b(content, digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Settled:
    """A folder's samples with ids that only equal images share; lists by shard.

    Attributes:
        traits: With these ids.
        repeats: For each shard, the shards that hold an equal sample before, by place.
        renamed: How many samples got an id of their own.
    """

    traits: list[list[Trait]]
    repeats: list[dict[int, str]]
    renamed: int


def tell_apart(names: Sequence[str], shards: Sequence[Sequence[Trait]]) -> Settled:
    """Tell apart what bears one id in several shards and is not one image.

    An id that samples bring counts in their source; one with the key of another image in another
    shard, or made from it, says nothing.

    Args:
        names: Of the shards.
        shards: The traits of each one's samples.
    """
    first_of_id: dict[int, tuple[int, Trait]] = {}
    first_of_key: dict[str, tuple[int, Trait]] = {}
    traits: list[list[Trait]] = []
    repeats: list[dict[int, str]] = []
    renamed = 0
    for number, (name, part) in enumerate(zip(names, shards, strict=True)):
        settled, again = [], {}
        for place, trait in enumerate(part):
            before, known = first_of_key.setdefault(trait.key, (number, trait))
            if before != number and known.joints == trait.joints:
                again[place] = names[before]
            owner, known = first_of_id.setdefault(trait.image, (number, trait))
            if owner != number and not _is_one(known, trait):
                mark = trait.key if trait.source is None else f"#{trait.image}"
                own = image_id_of(trait.source or "", f"{name}/{mark}")
                trait, renamed = replace(trait, image=own), renamed + 1
            settled.append(trait)
        traits.append(settled)
        repeats.append(again)
    return Settled(traits, repeats, renamed)


def _is_one(known: Trait, other: Trait) -> bool:
    """Whether samples of two shards that bear one id are of one image."""
    if known.joints[0] == other.joints[0]:
        return True
    return other.source is not None and known.source == other.source and known.key != other.key
