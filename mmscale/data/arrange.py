"""Batches built on purpose: rows change places inside a window of whole batches, never beyond.

What a window's batches become follows from what the lanes put into it, so the order stays a
function of seed, epoch, manifest and table, and every row still comes once. Hard batches are
built from a table of the images most like each image.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional as F

from mmscale.data.lanes import Item, sections
from mmscale.errors import DataError

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


NEIGHBOURS = 32
_CHUNK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each image.

    Attributes:
        image_ids: Identity of each image.
        rows: For each image the rows of those most like it, nearest first; -1 for none.
    """

    image_ids: Int64[np.ndarray, " n"]
    rows: Int32[np.ndarray, "n k"]

    def tensors(self) -> dict[str, Tensor]:
        """As a file or a checkpoint holds it."""
        ids, rows = torch.from_numpy(self.image_ids), torch.from_numpy(self.rows)
        return {"image_ids": ids, "neighbours": rows}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Neighbours":
        """From what `tensors` gave."""
        return cls(tensors["image_ids"].numpy(), tensors["neighbours"].numpy())

    def places(self, image_ids: Int64[np.ndarray, " samples"]) -> Int32[np.ndarray, "samples k"]:
        """For samples with these ids the places of their neighbours among them; -1 for none."""
        order = np.argsort(image_ids, kind="stable")
        place = _find(image_ids[order], self.image_ids)
        place[place >= 0] = order[place[place >= 0]]
        # The last entry is what -1 points at.
        place = np.append(place, -1).astype(np.int32)
        by_id = np.argsort(self.image_ids, kind="stable")
        row = _find(self.image_ids[by_id], image_ids)
        known = row >= 0
        places = np.full((len(image_ids), self.rows.shape[1]), -1, np.int32)
        places[known] = place[self.rows[by_id[row[known]]]]
        return places


def nearest(
    features: Float[Tensor, "n f"], image_ids: Int64[Tensor, " n"], count: int = NEIGHBOURS
) -> Neighbours:
    """The table of images by the cosine of their features; rows of one image are no neighbours."""
    unit = F.normalize(features.float(), dim=1)
    count = min(count, len(unit) - 1)
    rows = []
    for start in range(0, len(unit), _CHUNK):
        part = slice(start, start + _CHUNK)
        cosine = unit[part] @ unit.T
        cosine.masked_fill_(image_ids[part, None] == image_ids, -torch.inf)
        best = cosine.topk(count, dim=1)
        rows.append(best.indices.masked_fill(best.values == -torch.inf, -1).int().cpu())
    return Neighbours(image_ids.cpu().numpy(), torch.cat(rows).numpy())


def mean_by_image(
    features: Float[Tensor, "m f"], ids: Int64[Tensor, " m"], image_ids: Int64[Tensor, " n"]
) -> Float[Tensor, "n f"]:
    """Captions' features, each of norm 1, averaged over the captions of each image."""
    owners, place = image_ids.unique(return_inverse=True)
    row = torch.searchsorted(owners, ids).clamp(max=len(owners) - 1)
    mine = owners[row] == ids
    unit = F.normalize(features[mine].float(), dim=1)
    return unit.new_zeros(len(owners), unit.shape[1]).index_add_(0, row[mine], unit)[place]


def read_neighbours(path: Path, by: str) -> Neighbours:
    """A table that was given, or one of the embeddings that `mmscale embed` wrote.

    Args:
        path: npz or safetensors with `image_ids` [n] and `neighbours` [n k] (rows of `image_ids`,
            -1 for none); or with `image_ids`, `image` [n d] and, for captions, `text` [m d] and
            `text_ids` [m].
        by: `image` or `text`: what embeddings are compared.

    Raises:
        DataError: Neither.
    """
    arrays = _read(path)
    if "neighbours" in arrays:
        ids, rows = _array(path, arrays, "image_ids", 1), _array(path, arrays, "neighbours", 2)
        if len(ids) != len(rows) or rows.min(initial=-1) < -1 or rows.max(initial=-1) >= len(ids):
            raise DataError(
                f"{path}: `neighbours` {list(rows.shape)} must have a row for each of the "
                f"{len(ids)} image_ids and hold rows of it, or -1"
            )
        return Neighbours(ids.astype(np.int64), rows.astype(np.int32))
    image_ids = torch.from_numpy(_array(path, arrays, "image_ids", 1).astype(np.int64))
    features = torch.from_numpy(_array(path, arrays, by, 2)).float()
    if by == "text":
        owners = torch.from_numpy(_array(path, arrays, "text_ids", 1).astype(np.int64))
        if len(owners) != len(features):
            raise DataError(f"{path}: {len(features)} rows of `text`, {len(owners)} of `text_ids`")
        features = mean_by_image(features, owners, image_ids)
    finite = bool(torch.isfinite(features).all())
    if len(image_ids) != len(features) or len(image_ids) < 2 or not finite:
        raise DataError(
            f"{path}: needs a finite row of `{by}` for each of its image_ids, two or more"
        )
    return nearest(features, image_ids)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with np.load(path, allow_pickle=False) as content:
            names = {"image_ids", "neighbours", "image", "text", "text_ids"} & set(content.files)
            return {name: content[name] for name in names}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile, SafetensorError) as error:
        raise DataError(
            f"data.hard_batches.table={path}: cannot be read ({error}); name an npz of mmscale "
            "embed, or a table of neighbours"
        ) from error


def _array(path: Path, arrays: dict[str, Any], name: str, dimensions: int) -> np.ndarray:
    array = arrays.get(name)
    kind = "iu" if name in ("image_ids", "text_ids", "neighbours") else "f"
    if array is None or array.ndim != dimensions or array.dtype.kind not in kind:
        raise DataError(
            f"data.hard_batches.table={path}: has no array `{name}` of {dimensions} "
            f"dimension{'s' * (dimensions > 1)} and the right type; it needs image_ids and "
            "neighbours, or what mmscale embed writes"
        )
    return array


def _find(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands in an ascending array; -1 where it does not."""
    place = np.searchsorted(ascending, wanted).clip(max=max(0, len(ascending) - 1))
    return np.where(ascending[place] == wanted, place, -1) if len(ascending) else place - 1
