"""Shards without a manifest: drawn with replacement, each read forward to its end.

What a lane delivers follows from seed, epoch and lane alone. Draw n of a lane is one shard, whose
samples pass the lane's shuffling buffer in their order; an epoch begins somewhere in the first of
them, so that every sample has the same chance, however short an epoch is. Nothing tells beforehand
where a sample lies, so going on in mid-epoch reads the epoch's part before it again, without
decoding it.
"""

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, count, islice

from mmscale.config.data import DataConfig
from mmscale.data.choice import USUAL, Choice
from mmscale.data.far import Far
from mmscale.data.forward import Reading, read_from, read_through, size_of
from mmscale.data.lanes import seeded
from mmscale.data.members import Sample, image_id_of
from mmscale.data.reader import Drawn
from mmscale.data.remote import is_address, safe_url
from mmscale.data.shard_set import AT_ONCE, Place, ShardSet, Stretches
from mmscale.data.shards import scopes_of
from mmscale.errors import DataError

# Delivered samples that a lane remembers, to stand in for a damaged one.
_REMEMBERED = 32
# Draws in a row without a sample after which a lane gives up.
_MOST_EMPTY = 100
# Samples that are passed over at most before an epoch begins.
_ON = 16
# A server is asked for the sizes of so many shards; asking for more would delay the start.
_MOST_ASKED = 2_000


@dataclass(frozen=True)
class Resampling:
    """Shards that are drawn from, one in proportion to its source's weight.

    Attributes:
        paths: Where they lie.
        weights: How often each is drawn, against the others.
        epoch_samples: Images that count as an epoch.
        sizes: Bytes of each. An epoch begins in a shard in proportion to them, because a larger one
            has more samples to begin with; none: all count as equally large.
        left_out: Of each, the bytes of samples that are passed over; none: none are.
        choice: Which members of a sample are what.
    """

    paths: tuple[Place, ...]
    weights: tuple[float, ...]
    epoch_samples: int
    sizes: tuple[float, ...] = ()
    left_out: tuple[Stretches, ...] = ()
    choice: Choice = USUAL
    _counts: dict[Place, int] = field(default_factory=dict, compare=False, repr=False)

    def reading(self, shard: int) -> Reading:
        """What of a shard is read."""
        return Reading(self.left_out[shard] if self.left_out else (), self.choice)

    def identified(self, shard: int, content: Sample | str) -> Sample | str:
        """A sample with an id that no other image has.

        An id that its json brings counts within its source, a key within its shard.
        """
        if isinstance(content, str):
            return content
        source, name = self._scopes[shard]
        own = image_id_of(name, content.key) if content.source is None else content.image_id
        # Of the first source as they are; wherever the sources lie.
        return replace(content, image_id=own ^ (seeded("source", source) if source else 0))

    @cached_property
    def _scopes(self) -> list[tuple[int, str]]:
        return scopes_of(self.paths)

    def lanes(
        self, count: int, length: int, buffer: int, seed: int, epoch: int
    ) -> "list[SequentialLane]":
        """The lanes of one epoch; each reads its own shards."""
        return [
            SequentialLane(self, lane, count, length, buffer, seed, epoch) for lane in range(count)
        ]


def plan_resampling(data: DataConfig, shards: ShardSet) -> Resampling:
    """What is drawn, and how long an epoch is.

    Raises:
        DataError: A shard is not there, or the first, which tells the length where nothing else
            does, is not a tar.
    """
    weights = tuple(weight for count, weight in shards.sources for _ in range(count))
    samples = shards.counted if data.epoch_samples is None else data.epoch_samples
    choice = shards.choice(0)
    far = Far()
    if samples is None:
        reading = Reading(shards.left_out[0] if shards.left_out else (), choice)
        samples = len(shards.paths) * sum(1 for _ in read_through(shards.paths[0], far, reading))
    sizes = _sizes(shards.paths, far)
    far.close()
    return Resampling(shards.paths, weights, samples, sizes, shards.left_out, choice)


def _sizes(paths: Sequence[Place], far: Far) -> tuple[float, ...]:
    """Bytes of each shard, the mean of the others where nobody tells; none where nobody tells any.

    Raises:
        DataError: One is not there.
    """
    asks = sum(map(is_address, paths)) <= _MOST_ASKED
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(
            pool.map(lambda p: size_of(p, far) if asks or not is_address(p) else None, paths)
        )
    known = [size for size in found if size is not None]
    mean = sum(known) / max(1, len(known))
    return tuple(mean if size is None else float(size) for size in found) if mean else ()


class SequentialLane:
    """One lane of a resampled epoch: its samples in the order in which they are delivered.

    Args:
        resampling: What it draws from.
        index: Which lane.
        count: Lanes in all.
        length: Items in every lane.
        buffer: Samples held for shuffling, as raw bytes.
        seed: The run's seed.
        epoch: Which epoch.
    """

    def __init__(
        self,
        resampling: Resampling,
        index: int,
        count: int,
        length: int,
        buffer: int,
        seed: int,
        epoch: int,
    ):
        self._resampling, self._index, self._count = resampling, index, count
        self._length, self._buffer = length, min(buffer, length)
        self._seed = seeded(seed, epoch, "draws", index)
        self._delivered = 0
        self._past: deque[Drawn] = deque(maxlen=_REMEMBERED)
        self._next: deque[Drawn] = deque()
        self._source = self._shuffled()

    def items(self, start: int = 0) -> Iterator[Drawn]:
        """Items from the `start`-th on; getting there reads the shards so far. Once only."""
        while self._delivered < self._length:
            item = self._next.popleft() if self._next else next(self._source)
            self._past.append(item)
            self._delivered += 1
            if self._delivered > start:
                yield item

    def around(self, place: int) -> Iterator[Drawn]:
        """What may stand in for the item at `place`: some earlier ones, then some later."""
        past = list(self._past)
        at = max(0, place - self._delivered + len(past))
        yield from reversed(past[:at])
        yield from past[at + 1 :]
        for offset in range(_REMEMBERED):
            if offset == len(self._next):
                self._next.append(next(self._source))
            yield self._next[offset]

    def _shuffled(self) -> Iterator[Drawn]:
        """The epoch's items, then, for whoever looks for a stand-in, the ones that follow.

        The pool is full before the first leaves it, else the first batches would be made of
        neighbours, and it is emptied at the end: what is read is what is delivered.
        """
        draw = random.Random(self._seed).random
        # A place in bytes lies in a large sample more often than in a small one: a few samples on,
        # the one that it leads to no longer depends on that.
        source = islice(self._read(), seeded(self._seed, "on") % _ON, None)
        pool = list(islice(source, self._buffer))
        for entering in islice(source, self._length - self._buffer):
            slot = int(draw() * len(pool))
            leaving, pool[slot] = pool[slot], entering
            yield leaving
        while pool:
            slot = int(draw() * len(pool))
            pool[slot], pool[-1] = pool[-1], pool[slot]
            yield pool.pop()
        yield from source

    def _read(self) -> Iterator[Drawn]:
        """Every sample of the drawn shards, endlessly, from some place in the first on."""
        plan = self._resampling
        paths, edges = plan.paths, list(accumulate(plan.weights))
        far, empty = Far(), 0
        for number in count():
            turn, empty = number * self._count + self._index, empty + 1
            if number == 0:
                shard = self._draw(list(accumulate(self._beginnings())), number)
                part = _fraction(self._seed, "part")
                samples = read_from(paths[shard], far, part, plan._counts, plan.reading(shard))
            else:
                shard = self._draw(edges, number)
                samples = read_through(paths[shard], far, plan.reading(shard))
            for sample, content in enumerate(samples):
                empty = 0
                yield Drawn(shard, sample, turn, turn, plan.identified(shard, content))
            if empty >= _MOST_EMPTY:
                raise DataError(
                    f"{safe_url(paths[shard])}: holds no sample, like {empty - 1} drawn before it; "
                    "check data.train"
                )

    def _beginnings(self) -> list[float]:
        """How often an epoch begins in each shard, against the others."""
        weights, sizes = self._resampling.weights, self._resampling.sizes
        return [w * size for w, size in zip(weights, sizes or (1.0,) * len(weights), strict=True)]

    def _draw(self, edges: Sequence[float], number: int) -> int:
        return min(bisect_right(edges, _fraction(self._seed, number) * edges[-1]), len(edges) - 1)


def _fraction(*seed: object) -> float:
    # 53 bits: as many as a float can tell apart below 1.
    return (seeded(*seed) >> 10) / 2**53
