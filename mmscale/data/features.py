"""Outputs of both towers for every image and caption of a set, and the stream that reads them.

Also what a pass through the towers has computed before it was cut short, kept for the next one.
A table is written by `engine/encode.py`; with frozen towers it stands in for decoding.
"""

import bisect
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmscale.contracts import Batch, Position, World
from mmscale.data.arrange import Neighbours, mean_by_image, nearest
from mmscale.data.lanes import Item
from mmscale.data.samples import SampleBatch
from mmscale.data.schedule import AnyLane, Schedule
from mmscale.data.shards import ShardSet
from mmscale.errors import DataError
from mmscale.outputs import publish, sync


@dataclass(frozen=True)
class FeatureTable:
    """Tower outputs in manifest order.

    Attributes:
        image: One row a sample; zeros where the sample is damaged.
        text: One row a caption, sample by sample.
        first: Row of `text` at which each sample's captions begin; one more entry closes the last.
        image_ids: Identity of each sample.
        good: False where the sample could not be decoded.
        cut: Captions that had more tokens than the tower takes.
        keys: Key of each sample.
        captions: Every caption, in the order of `text`.
        damaged: One line for each sample that could not be decoded.
    """

    image: Float[Tensor, "samples f"]
    text: Float[Tensor, "captions g"]
    first: Int64[Tensor, " edges"]
    image_ids: Int64[Tensor, " samples"]
    good: Bool[Tensor, " samples"]
    cut: Bool[Tensor, " captions"]
    keys: list[str]
    captions: list[str]
    damaged: list[str]

    def text_ids(self) -> Int64[Tensor, " captions"]:
        """The image id that each caption belongs to."""
        return self.image_ids.repeat_interleave(self.first.diff())

    def neighbours(self, by: str = "image") -> Neighbours:
        """The table of hard batches: which images' features are nearest to each image's.

        Args:
            by: `image`, or `text` for the mean of an image's captions.
        """
        owners = torch.arange(len(self.keys)).repeat_interleave(self.first.diff())
        places = self.good.nonzero()[:, 0]
        features = self.image[places]
        if by == "text":
            features = mean_by_image(self.text, owners, places)
        return nearest(features, self.image_ids[places])

    def save(self, path: Path) -> None:
        """Write aside, then rename."""
        texts = {"keys": self.keys, "captions": self.captions, "damaged": self.damaged}
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: getattr(self, name).contiguous() for name in _TENSORS},
            aside,
            {"texts": json.dumps(texts)},
        )
        sync(aside)
        publish(aside, path)

    @classmethod
    def load(cls, path: Path) -> "FeatureTable":
        """Read what `save` wrote.

        Raises:
            DataError: Not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                texts = json.loads((file.metadata() or {})["texts"])
        except Exception as error:
            raise DataError(f"{path}: not a feature cache ({error}); remove the file") from error
        return cls(**tensors, **texts)


_TENSORS = ("image", "text", "first", "image_ids", "good", "cut")


class CachedStream:
    """The training stream over a table: the rows of `TrainStream`, without decoding."""

    def __init__(self, schedule: Schedule, shards: ShardSet, table: FeatureTable, world: World):
        self.schedule = schedule
        self._table = table
        self._starts = [0, *accumulate(shard.samples for shard in shards.shards)]
        count = schedule.lanes // world.size
        self._mine = range(world.rank * count, (world.rank + 1) * count)
        self._captions = [int(n) for n in table.first.diff()]

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Endless batches from `position` on, each with the position after it."""
        while True:
            step = position.rows // self.schedule.batch_rows
            count = self.schedule.lane_items
            epoch = position.epoch
            streams = self.schedule.streams(epoch, self._mine, step)
            for at in range(step, self.schedule.steps):
                rows: list[tuple[int, int]] = []
                damaged: list[str] = []
                for lane, items in streams:
                    for offset, item in enumerate(islice(items, count)):
                        place = self._place(item)
                        if not self._table.good[place]:
                            damaged.append(f"{self._table.keys[place] or place}: undecodable image")
                            item = self._nearest(lane, at * count + offset)
                        rows += self._rows(item, epoch)
                position = self.schedule.after(position)
                yield self._batch(rows, damaged), position

    def _place(self, item: Item) -> int:
        return self._starts[item.shard] + item.sample

    def _item(self, place: int) -> tuple[int, int]:
        """Shard and sample of a place in the table."""
        shard = bisect.bisect_right(self._starts, place) - 1
        return shard, place - self._starts[shard]

    def _rows(self, item: Item, epoch: int) -> list[tuple[int, int]]:
        place = self._place(item)
        key, captions = self._table.keys[place], self._captions[place]
        return [(place, c) for c in self.schedule.pick(key, captions, epoch, item.turn)]

    def _nearest(self, lane: AnyLane, place: int) -> Item:
        for item in lane.around(place):
            if self._table.good[self._place(item)]:
                return item
        raise DataError("a whole lane of data.train cannot be decoded; run mmscale verify")

    def _batch(self, rows: list[tuple[int, int]], damaged: list[str]) -> Batch:
        table, marks = self._table, self.schedule.marks
        places = torch.tensor([place for place, _ in rows])
        texts = table.first[places] + torch.tensor([choice for _, choice in rows])
        return Batch(
            image=table.image[places],
            tokens=table.text[texts],
            mask=None,
            image_ids=table.image_ids[places],
            match_ids=torch.tensor(
                [marks.match_id(*self._item(p), int(table.image_ids[p])) for p, _ in rows]
            ),
            labels=torch.tensor([marks.label(*self._item(p)) for p, _ in rows]),
            keys=[f"{table.keys[place]}#{choice}" for place, choice in rows],
            captions=[table.captions[index] for index in texts.tolist()],
            cut=int(table.cut[texts].sum()),
            damaged=damaged,
        )


# A pass writes what it has computed so far this often.
_SECONDS_BETWEEN_PARTS = 60.0
_SIDES = ("image", "text")
_LISTS = ("tokens", "cut", "places", "image_ids", "keys", "captions", "damaged")


@dataclass(frozen=True)
class EncodedBatch:
    """One batch of a set and its tower outputs."""

    batch: SampleBatch
    image: Float[Tensor, "samples f"]
    text: Float[Tensor, "captions g"]


class KeptParts:
    """The parts of one table, by the places of their batches.

    A rank uses those whose batches are its own: those of another world or batch size lie elsewhere.

    Args:
        folder: Of the cache; another rank's parts are used where the folder is shared.
        digest: Names the table.
    """

    def __init__(self, folder: Path, digest: str):
        self._folder, self._digest = folder, digest
        self._new: list[tuple[range, EncodedBatch]] = []
        self._written = time.monotonic()
        self._there = dict(self._read())

    @property
    def count(self) -> int:
        """Samples that were there at the beginning."""
        return sum(len(range(*place)) for place in self._there)

    def find(self, batches: Sequence[range]) -> dict[int, EncodedBatch]:
        """What is there of some batches, by their number."""
        places = [(places.start, places.stop) for places in batches]
        return {n: self._there[place] for n, place in enumerate(places) if place in self._there}

    def add(self, places: range, part: EncodedBatch) -> None:
        """Take a batch that is done."""
        self._new.append((places, part))
        if time.monotonic() - self._written > _SECONDS_BETWEEN_PARTS:
            self._write()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The pass: however it is cut short, what was added is kept."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def remove(self) -> None:
        """The table is there."""
        for path in self._paths():
            with suppress(OSError):
                path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f".{self._digest}-*.safetensors"))

    def _read(self) -> Iterator[tuple[tuple[int, int], EncodedBatch]]:
        for path in self._paths():
            try:
                with safe_open(path, "pt") as file:
                    notes = json.loads((file.metadata() or {})["parts"])
                    for number, (start, stop, lists) in enumerate(notes):
                        batch = SampleBatch(None, **{name: lists[name] for name in _LISTS})
                        batch.captions = [tuple(captions) for captions in batch.captions]
                        image, text = (file.get_tensor(f"{side}{number}") for side in _SIDES)
                        if len(image) == len(batch.places) and len(text) == len(batch.cut):
                            yield (int(start), int(stop)), EncodedBatch(batch, image, text)
            except (OSError, SafetensorError, ValueError, LookupError, TypeError):
                # Of no use to anybody; what it held is computed again.
                continue

    def _write(self) -> None:
        """A file of what is new; a disk that has no room for it costs the parts, not the run."""
        if not self._new:
            return
        tensors: dict[str, Tensor] = {}
        notes = []
        for number, (places, part) in enumerate(self._new):
            tensors |= {f"image{number}": part.image, f"text{number}": part.text}
            lists = {name: getattr(part.batch, name) for name in _LISTS}
            notes.append((places.start, places.stop, lists))
        name = f".{self._digest}-{self._new[0][0].start}-{self._new[-1][0].stop}.safetensors"
        aside = self._folder / f"{name}.part"
        with suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({k: t.contiguous() for k, t in tensors.items()}, aside, _note(notes))
            publish(aside, self._folder / name)
        self._new, self._written = [], time.monotonic()


def _note(notes: list[tuple[int, int, dict[str, list[object]]]]) -> dict[str, str]:
    return {"parts": json.dumps(notes)}
