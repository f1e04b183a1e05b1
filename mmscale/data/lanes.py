"""The order of the stream: a function of seed, epoch and manifest, never of ranks or workers.

An epoch is a tape of items: the shards in a seeded order, laid end to end, started at a seeded
place (so that the remainder differs each epoch) and cut into lanes of equal length. Each lane
shuffles through its own seeded buffer. Nothing here reads a file.
"""

import bisect
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Item:
    """One sample's turn.

    Attributes:
        shard: Index in the manifest.
        sample: Index within the shard.
        turn: Which of the epoch's passes over the data this is; above 0 only where every caption
            is a row of its own.
    """

    shard: int
    sample: int
    turn: int


def seeded(*parts: object) -> int:
    """A 63-bit number drawn from `parts` alone."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Tape:
    """One epoch's items in reading order.

    Args:
        turns: For each shard, for each pass, the samples that take part in it.
        seed: The run's seed.
        epoch: Which epoch.
    """

    def __init__(self, turns: Sequence[Sequence[Sequence[int]]], seed: int, epoch: int):
        self._segments: list[tuple[int, int]] = []
        for turn in range(max(map(len, turns), default=0)):
            shards = [shard for shard, passes in enumerate(turns) if turn < len(passes)]
            random.Random(seeded(seed, epoch, "shards", turn)).shuffle(shards)
            self._segments += [(shard, turn) for shard in shards]
        self._turns = turns
        sizes = [len(turns[shard][turn]) for shard, turn in self._segments]
        self._starts = [0, *accumulate(sizes)]
        self._shift = seeded(seed, epoch, "start") % max(1, len(self))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: int) -> Item:
        place = (place + self._shift) % len(self)
        segment = bisect.bisect_right(self._starts, place) - 1
        shard, turn = self._segments[segment]
        return Item(shard, self._turns[shard][turn][place - self._starts[segment]], turn)


class Lane:
    """One lane of an epoch: its items in the order in which they are delivered.

    Args:
        tape: The epoch.
        index: Which lane.
        length: Items in every lane.
        buffer: Samples held for shuffling.
        seed: The run's seed.
        epoch: Which epoch.
    """

    def __init__(self, tape: Tape, index: int, length: int, buffer: int, seed: int, epoch: int):
        self._tape = tape
        self._first = index * length
        self._length = length
        self._buffer = min(buffer, length)
        self._seed = seeded(seed, epoch, "lane", index)

    def items(self, start: int = 0) -> Iterator[Item]:
        """Items from the `start`-th on; getting there costs a few random numbers an item."""
        for delivered, place in enumerate(self._places()):
            if delivered >= start:
                yield self._tape[self._first + place]

    def around(self, place: int) -> Iterator[Item]:
        """What may stand in for the item at `place`: the nearest earlier ones, then the later."""
        items = list(self.items())
        yield from reversed(items[:place])
        yield from items[place + 1 :]

    def _places(self) -> Iterator[int]:
        draw = random.Random(self._seed).random
        pool = list(range(self._buffer))
        for entering in range(self._buffer, self._length):
            slot = int(draw() * len(pool))
            leaving, pool[slot] = pool[slot], entering
            yield leaving
        while pool:
            slot = int(draw() * len(pool))
            pool[slot], pool[-1] = pool[-1], pool[slot]
            yield pool.pop()


def turns_of(captions: Sequence[Sequence[int]], flat: bool) -> list[list[list[int]]]:
    """Which samples take part in which pass.

    Args:
        captions: For each shard, each sample's number of captions.
        flat: Every caption its own row: a sample with c captions takes part in c passes.
    """
    if not flat:
        return [[list(range(len(counts)))] for counts in captions]
    return [
        [
            [sample for sample, count in enumerate(counts) if count > turn]
            for turn in range(max(counts, default=0))
        ]
        for counts in captions
    ]


def sections(length: int, parts: int) -> list[range]:
    """`length` places cut into `parts` neighbouring ranges whose sizes differ by at most one."""
    edges = [length * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges)]
