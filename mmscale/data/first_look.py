"""What manifests alone tell of a run's data before it begins: no shard is read for it."""

from collections.abc import Iterator, Mapping

import numpy as np

from mmscale.data.grouping import copies_line
from mmscale.data.mask import is_within
from mmscale.data.shard_set import ShardSet, place_of

# Below it, captions that a few images share are no fault of a data set.
_TOLD_SHARE = 0.01
# Of more images the ids are not looked at: it would delay the start.
_MOST_IMAGES = 2_000_000


def first_look(match: str, train: ShardSet, held_out: Mapping[str, ShardSet]) -> Iterator[str]:
    """A line for each thing that is wrong with the data.

    Args:
        match: What makes two training images one (`data.match`).
        train: The training set.
        held_out: Sets of pairs that the run is evaluated on, by their settings.
    """
    if match == "image":
        yield from _copies("data.train", train)
        yield from _repeats(train)
    for setting, shards in held_out.items():
        yield from _copies(setting, shards)
        yield from _shared(setting, train, shards)


def _copies(setting: str, shards: ShardSet) -> Iterator[str]:
    if line := copies_line(setting, shards.copies, shards.samples):
        yield line


def _repeats(train: ShardSet) -> Iterator[str]:
    """Images that captions make one with another, besides those with equal bytes."""
    known = [shard.identities for shard in train.shards if shard.identities is not None]
    if train.samples > _MOST_IMAGES or not known:
        return
    ids = np.concatenate([np.array(list(part.captions), np.int64) for part in known])
    images = np.concatenate([np.array(list(part.images), np.int64) for part in known])
    _, group, counts = np.unique(ids, return_inverse=True, return_counts=True)
    # Several samples of one image are no negatives of one another.
    alone = np.unique(np.stack([ids, images]), axis=1)
    others = np.unique(alone[0], return_counts=True)[1]
    joined = int(counts[others > 1].sum())
    if joined - 2 * train.copies < _TOLD_SHARE * len(group):
        return
    yield (
        f"data.train: {joined:,} of {len(group):,} images share a caption, but for case and "
        "punctuation, or their bytes with another; each is a negative of the other's caption "
        "unless data.match=caption (mmscale examine shows which)"
    )


def _shared(setting: str, train: ShardSet, held_out: ShardSet) -> Iterator[str]:
    """Images that a run is evaluated on and trains on: those at one place of one shard."""
    numbers = {place_of(path): number for number, path in enumerate(train.paths)}
    by_content = {shard.sha256: number for number, shard in enumerate(train.shards)}
    same = 0
    for path, shard in zip(held_out.paths, held_out.shards, strict=True):
        number = by_content.get(shard.sha256, numbers.get(place_of(path)))
        if number is None:
            continue
        if train.shards:
            same += len(set(shard.offsets).intersection(train.shards[number].offsets))
            continue
        left_out = train.left_out[number] if train.left_out else ()
        same += sum(not is_within(left_out, offset) for offset in shard.offsets)
    if same:
        yield (
            f"{setting}: {same:,} of its {held_out.samples:,} images are in data.train too; "
            "recalls and verdicts are not of held-out pairs"
        )
