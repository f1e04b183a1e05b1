"""Batches built on purpose: rows change places inside a window of whole batches, never beyond.

What a window's batches become follows from what the lanes put into it, so the order stays a
function of seed, epoch, manifest and table, and every row still comes once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mmscale.data.lanes import Item, sections

Candidates = Callable[[int], Iterator[int]]


@dataclass(frozen=True)
class Arrangement:
    """What the batches of a run are built for.

    Attributes:
        width: Batches of a window; the last ones of an epoch may hold more.
        samples: Samples of each shard.
        groups: Match id of every sample, in manifest order.
        positive_share: Share of a batch's items that sit beside another of their group, as far as
            the window holds one, while no others do; None leaves groups as they fall.
        neighbours: For every sample the places of those most like it, nearest first, -1 for none;
            None without hard batches.
        hard_share: Share of a batch's items that are brought in as neighbours of others.
    """

    width: int
    samples: tuple[int, ...]
    groups: Sequence[int]
    positive_share: float | None = None
    neighbours: np.ndarray | None = None
    hard_share: float = 0.0

    def windows(self, steps: int) -> list[range]:
        """The batches of an epoch, cut into windows."""
        return sections(steps, max(1, steps // self.width))

    def arrange(self, batches: list[list[Item]]) -> list[list[Item]]:
        """A window's batches with their items in new places."""
        starts = [0, *accumulate(self.samples)]
        items = [item for batch in batches for item in batch]
        places = [starts[item.shard] + item.sample for item in items]
        groups = [self.groups[place] for place in places]
        size = len(batches[0])
        window = _Window(groups, size, spread=self.positive_share is not None)
        if self.positive_share:
            window.bring_all(_mates(groups, window), round(self.positive_share * size / 2), 1)
        if self.neighbours is not None:
            candidates = _neighbours(places, groups, self.neighbours)
            wanted = min(size - 1, round(self.hard_share * size))
            each = -(-wanted // (size - wanted))
            window.bring_all(candidates, wanted, each)
        return [[items[i] for i in seats] for seats in window.batches()]


class _Window:
    """Who sits where; items are numbers, seat s is of batch s // size.

    Args:
        groups: Group of each item.
        size: Seats of a batch.
        spread: Keep items of one group in different batches, as far as there are batches.
    """

    def __init__(self, groups: list[int], size: int, spread: bool):
        self.settled = [False] * len(groups)
        self._groups, self._size, self._spread = groups, size, spread
        self._sits = list(range(len(groups)))
        if spread and self._crowded():
            self._deal()
        self._seat = [0] * len(groups)
        for seat, item in enumerate(self._sits):
            self._seat[item] = seat
        self._held: list[dict[int, int]] = [{} for _ in range(len(groups) // size)]
        for seat, item in enumerate(self._sits):
            self._count(seat // size, item, 1)

    def batches(self) -> list[list[int]]:
        """Items of each batch."""
        return [self._sits[s : s + self._size] for s in range(0, len(self._sits), self._size)]

    def bring_all(self, candidates: Candidates, wanted: int, each: int) -> None:
        """Bring candidates beside the items that they are candidates of; batches take turns.

        Args:
            candidates: Items that may come beside an item, best first.
            wanted: Items to bring into each batch.
            each: Most that come beside one item, while there are others.
        """
        guests = [self._guests(batch, candidates, wanted, each) for batch in range(len(self._held))]
        while guests:
            guests = [turns for turns in guests if next(turns, False)]

    def _guests(self, batch: int, candidates: Candidates, wanted: int, each: int) -> Iterator[bool]:
        """Bring one item a turn: first close to its host, then whoever is missing to any seat."""
        first, stop = batch * self._size, (batch + 1) * self._size
        for is_close, most in ((True, each), (False, self._size)):
            seat, open_seat = first, first
            while seat < stop and wanted:
                host, came = self._sits[seat], 0
                for guest in candidates(host):
                    if came == most or not wanted:
                        break
                    open_seat = self._first_free(open_seat, stop)
                    free = self._first_free(seat + 1 if is_close else open_seat, stop, host)
                    if free == stop:
                        break
                    if self._swap(guest, free, host):
                        came, wanted = came + 1, wanted - 1
                        yield True
                seat += 1 + (came if is_close else 0)

    def _first_free(self, seat: int, stop: int, host: int | None = None) -> int:
        """The first seat from here on whose item may leave; `stop` without one."""
        while seat < stop and (self.settled[self._sits[seat]] or self._sits[seat] == host):
            seat += 1
        return seat

    def _swap(self, guest: int, seat: int, host: int) -> bool:
        """Seat a guest beside its host, unless it is settled or would crowd a group."""
        leaving = self._sits[seat]
        here, there = seat // self._size, self._seat[guest] // self._size
        if guest == host or self.settled[guest]:
            return False
        if here != there:
            if self._spread and not self._fits(guest, here, leaving, host):
                return False
            if self._spread and not self._fits(leaving, there, guest, None):
                return False
            for batch, item, change in (
                (here, leaving, -1),
                (there, guest, -1),
                (here, guest, 1),
                (there, leaving, 1),
            ):
                self._count(batch, item, change)
        self._sits[self._seat[guest]], self._sits[seat] = leaving, guest
        self._seat[leaving], self._seat[guest] = self._seat[guest], seat
        self.settled[guest] = self.settled[host] = True
        return True

    def _fits(self, item: int, batch: int, leaving: int, host: int | None) -> bool:
        """Whether a batch holds nobody of an item's group but who leaves and the host."""
        group = self._groups[item]
        others = self._held[batch].get(group, 0) - (self._groups[leaving] == group)
        return others - (host is not None and self._groups[host] == group) <= 0

    def _count(self, batch: int, item: int, change: int) -> None:
        held, group = self._held[batch], self._groups[item]
        held[group] = held.get(group, 0) + change

    def _crowded(self) -> bool:
        batches = (self._groups[s : s + self._size] for s in range(0, len(self._sits), self._size))
        return any(len(set(batch)) < len(batch) for batch in batches)

    def _deal(self) -> None:
        """Deal the items like cards, each group in a row, so that neighbours part."""
        first: dict[int, int] = {}
        for item, group in enumerate(self._groups):
            first.setdefault(group, item)
        order = sorted(self._sits, key=lambda item: (first[self._groups[item]], item))
        batches = len(order) // self._size
        self._sits = [item for batch in range(batches) for item in order[batch::batches]]


def _mates(groups: list[int], window: _Window) -> Candidates:
    """Others of an item's group that are not settled yet."""
    members: dict[int, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)

    def candidates(host: int) -> Iterator[int]:
        mates = members[groups[host]]
        if window.settled[host] or len(mates) == 1:
            return
        # Settled ones leave the list, so that a large group is not gone through again and again.
        mates[:] = [mate for mate in mates if not window.settled[mate]]
        yield from list(mates)

    return candidates


def _neighbours(places: list[int], groups: list[int], neighbours: np.ndarray) -> Candidates:
    """The window's items that a table calls near, and that are no positives."""
    at = {place: item for item, place in reversed(list(enumerate(places)))}

    def candidates(host: int) -> Iterator[int]:
        for place in neighbours[places[host]].tolist():
            guest = at.get(place)
            if guest is not None and groups[guest] != groups[host]:
                yield guest

    return candidates
