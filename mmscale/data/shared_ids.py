"""Samples of several shards that bear one id: the same image, or others under names used again.

Tools number samples anew in every shard, and an id made from a key is then that of many images.
What a manifest is made from and what it is checked against must agree about this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmscale.data.grouping import Trait
from mmscale.data.members import image_id_of


@dataclass(frozen=True)
class Bearer:
    """A sample and what it is called.

    Attributes:
        key: Its key.
        trait: What joins it to others.
        source: What its json calls the set in which its own id counts; None where the id was made
            from the key.
    """

    key: str
    trait: Trait
    source: str | None = None

    @property
    def image(self) -> int:
        """Digest of the image's bytes."""
        return self.trait.joints[0]


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


def settle(names: Sequence[str], shards: Sequence[Sequence[Bearer]]) -> Settled:
    """Tell apart what bears one id in several shards and is not one image.

    An id that samples bring counts in their source; one with the key of another image in another
    shard, or made from it, says nothing.

    Args:
        names: Of the shards.
        shards: What each holds.
    """
    first_of_id: dict[int, tuple[int, Bearer]] = {}
    first_of_key: dict[str, tuple[int, Bearer]] = {}
    traits: list[list[Trait]] = []
    repeats: list[dict[int, str]] = []
    renamed = 0
    for number, (name, bearers) in enumerate(zip(names, shards, strict=True)):
        settled, again = [], {}
        for place, bearer in enumerate(bearers):
            before, known = first_of_key.setdefault(bearer.key, (number, bearer))
            if before != number and known.trait.joints == bearer.trait.joints:
                again[place] = names[before]
            owner, known = first_of_id.setdefault(bearer.trait.image, (number, bearer))
            trait = bearer.trait
            if owner != number and not _is_one(known, bearer):
                mark = bearer.key if bearer.source is None else f"#{trait.image}"
                own = image_id_of(bearer.source or "", f"{name}/{mark}")
                trait, renamed = replace(trait, image=own), renamed + 1
            settled.append(trait)
        traits.append(settled)
        repeats.append(again)
    return Settled(traits, repeats, renamed)


def _is_one(known: Bearer, other: Bearer) -> bool:
    """Whether samples of two shards that bear one id are of one image."""
    if known.image == other.image:
        return True
    return other.source is not None and known.source == other.source and known.key != other.key
