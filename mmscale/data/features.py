"""Outputs of both towers for every image and caption of a set, and the stream that reads them.

A table is written by `engine/encode.py`; with frozen towers it stands in for decoding.
"""

import bisect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmscale.contracts import Batch, Position, World
from mmscale.data.lanes import Item
from mmscale.data.neighbours import Neighbours, mean_by_image, nearest
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
