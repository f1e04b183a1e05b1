"""The order of the stream: a function of seed, epoch and manifest, never of ranks or workers.

An epoch is a tape of items: each source's shards in a seeded order, laid end to end as often as its
weight says, the sources mixed evenly. The tape is started at a seeded place (so that the remainder
differs each epoch) and cut into lanes of equal length. Each lane shuffles through its own seeded
buffer. Nothing here reads a file.
"""

import bisect
import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise


@dataclass(frozen=True)
class Item:
    """One sample's turn.

    Attributes:
        shard: Index among the shards of all sources.
        sample: Index within the shard.
        turn: Which of the sample's turns in this epoch this is; above 0 only where every caption
            is a row of its own, or a source weighs more than 1.
        lap: Which of the epoch's passes over its source this is; above 0 only with a weight.
    """

    shard: int
    sample: int
    turn: int
    lap: int = 0


@dataclass(frozen=True)
class WeightedShards:
    """Neighbouring shards with one weight.

    Attributes:
        turns: For each shard, for each pass, the samples that take part in it.
        weight: How often an epoch shows each sample. The whole part is so many laps over the
            source; of the fraction, that share of one more lap is drawn, another in each epoch.
    """

    turns: Sequence[Sequence[Sequence[int]]]
    weight: float = 1.0

    @cached_property
    def lap_items(self) -> int:
        """Turns of one pass over the source, or of all passes where captions are rows."""
        return sum(len(samples) for passes in self.turns for samples in passes)

    @property
    def items(self) -> int:
        """Turns of an epoch."""
        return int(self.weight * self.lap_items + 0.5)


def seeded(*parts: object) -> int:
    """A 63-bit number drawn from `parts` alone."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class _Lap:
    """One pass over a source: its shards in a seeded order, laid end to end."""

    def __init__(self, source: WeightedShards, first_shard: int, lap: int, *seed: object):
        passes = max(map(len, source.turns), default=0)
        self._segments: list[tuple[int, int]] = []
        for turn in range(passes):
            shards = [shard for shard, parts in enumerate(source.turns) if turn < len(parts)]
            random.Random(seeded(*seed, "shards", turn)).shuffle(shards)
            self._segments += [(shard, turn) for shard in shards]
        sizes = [len(source.turns[shard][turn]) for shard, turn in self._segments]
        self._starts = [0, *accumulate(sizes)]
        self._turns, self._first_shard = source.turns, first_shard
        self._lap, self._first_turn = lap, lap * passes

    def __getitem__(self, place: int) -> Item:
        segment = bisect.bisect_right(self._starts, place) - 1
        shard, turn = self._segments[segment]
        sample = self._turns[shard][turn][place - self._starts[segment]]
        return Item(self._first_shard + shard, sample, self._first_turn + turn, self._lap)


class _Reel:
    """A source's items of one epoch: whole laps, then a part of one from a seeded place on."""

    def __init__(
        self, source: WeightedShards, first_shard: int, number: int, seed: int, epoch: int
    ):
        self._size, self._length = source.lap_items, source.items
        laps = -(-self._length // self._size) if self._size else 0
        self._laps = [
            _Lap(source, first_shard, lap, seed, epoch, *((number, lap) if number or lap else ()))
            for lap in range(laps)
        ]
        self._part = self._length // self._size if self._size else 0
        self._start = seeded(seed, epoch, "part", number) % max(1, self._size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> Item:
        lap, within = divmod(place, self._size)
        if lap == self._part:
            within = (within + self._start) % self._size
        return self._laps[lap][within]


class Tape:
    """One epoch's items in reading order.

    Sources are mixed item by item: any stretch of the tape holds each source's share of the epoch,
    to within one item a source.

    Args:
        sources: What the epoch is made of; their shards are numbered through.
        seed: The run's seed.
        epoch: Which epoch.
    """

    def __init__(self, sources: Sequence[WeightedShards], seed: int, epoch: int):
        firsts = accumulate((len(source.turns) for source in sources), initial=0)
        self._reels = [
            _Reel(source, first, number, seed, epoch)
            for number, (source, first) in enumerate(zip(sources, firsts, strict=False))
        ]
        self._length = sum(map(len, self._reels))
        self._shift = seeded(seed, epoch, "start") % max(1, self._length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> Item:
        place = (place + self._shift) % self._length
        left = self._length
        for reel in self._reels:
            # Of the first p places of what is left, p * size / left belong to this reel, rounded.
            size = len(reel)
            before, after = ((p * size + left // 2) // left for p in (place, place + 1))
            if after > before:
                return reel[before]
            place, left = place - before, left - size
        raise IndexError(place)


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
        for nearest in chain(range(place - 1, -1, -1), range(place + 1, self._length)):
            yield self._tape[self._first + self._order[nearest]]

    @cached_property
    def _order(self) -> array:
        """Every place in the order of delivery: only kept where something had to be replaced."""
        return array("q", self._places())

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


def turns_of(captions: Sequence[Sequence[int]], flat: bool) -> list[list[Sequence[int]]]:
    """Which samples take part in which pass.

    Args:
        captions: For each shard, each sample's number of captions.
        flat: Every caption its own row: a sample with c captions takes part in c passes.
    """
    if not flat:
        return [[range(len(counts))] for counts in captions]
    return [
        [
            range(len(counts))
            if turn < min(counts)
            else [sample for sample, count in enumerate(counts) if count > turn]
            for turn in range(max(counts, default=0))
        ]
        for counts in captions
    ]


def sections(length: int, parts: int) -> list[range]:
    """`length` places cut into `parts` neighbouring ranges whose sizes differ by at most one."""
    edges = [length * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges)]
