"""Every image of a set once, and what the towers make of it: tables, and a stream over them.

`SampleBatches` decodes a set in manifest order, for evaluation and for tables. A table holds the
outputs of both towers for every image and caption; `engine/encode.py` computes it, and with frozen
towers it stands in for decoding. What a pass has computed before it was cut short is kept for the
next one.
"""

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmscale.contracts import Batch, InputSpec, Position, World
from mmscale.data.arrange import Neighbours, mean_by_image, nearest
from mmscale.data.caption_text import are_cut
from mmscale.data.damage import DamagedSampleError
from mmscale.data.lanes import Item
from mmscale.data.pixels import EvalTransform, decode, stack_rows
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import Schedule
from mmscale.data.shards import ShardSet
from mmscale.errors import DataError
from mmscale.outputs import publish, sync
from mmscale.parallel.signals import outlive_termination


@dataclass
class SampleBatch:
    """Consecutive samples. Samples that cannot be decoded are named and leave no row.

    Attributes:
        pixels: [m c h w] bytes; None where every sample is damaged.
        tokens: Token ids of all captions of these samples, one list each.
        cut: Whether each of them had more tokens than the tower takes.
        places: Place of each decoded sample in the whole set.
        image_ids: Identity of each decoded sample.
        keys: Key of each decoded sample.
        captions: Captions of each decoded sample.
        damaged: One line for each sample that could not be decoded.
    """

    pixels: Tensor | None
    tokens: list[list[int]] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class SampleBatches(Dataset):
    """Batch j holds the samples `places[j * size : (j + 1) * size]`, decoded for evaluation."""

    def __init__(self, shards: ShardSet, spec: InputSpec, places: range, size: int):
        self._shards, self._spec, self._places, self._size = shards, spec, places, size
        self._transform = EvalTransform(spec)
        self._reader: SampleReader | None = None

    def __len__(self) -> int:
        return -(-len(self._places) // self._size)

    def __getitem__(self, index: int) -> SampleBatch:
        if index >= len(self):
            raise IndexError(index)
        self._reader = self._reader or SampleReader(self._shards)
        batch, pixels = SampleBatch(None), []
        for place in self._places[index * self._size : (index + 1) * self._size]:
            try:
                sample = self._reader.read(*self._shards.sample_at(place))
                pixels.append(self._transform(decode(sample.image, sample.key)))
            except DamagedSampleError as error:
                batch.damaged.append(str(error))
                continue
            batch.places.append(place)
            batch.image_ids.append(sample.image_id)
            batch.keys.append(sample.key)
            batch.captions.append(sample.captions)
        if pixels:
            batch.pixels = stack_rows(pixels)
        texts = [caption for captions in batch.captions for caption in captions]
        batch.tokens = self._spec.tokenize(texts)
        batch.cut = are_cut(self._spec, texts, batch.tokens)
        return batch

    def ranges(self) -> list[range]:
        """The places of each batch."""
        starts = range(0, len(self._places), self._size)
        return [self._places[start : start + self._size] for start in starts]

    def loader(self, workers: int, skip: Collection[int] = ()) -> Iterator[SampleBatch]:
        """Batches in order, decoded by `workers` processes, without those to skip.

        Raises:
            DataError: A shard cannot be read.
        """
        return loaded(self, workers, skip)


def loaded(batches: Dataset, workers: int, skip: Collection[int] = ()) -> Iterator[Any]:
    """Batches in order, made by `workers` processes, without those to skip.

    Raises:
        DataError: One of them raised it.
    """
    told = _Told(batches)
    loader = DataLoader(
        told,
        batch_size=None,
        sampler=[index for index in range(len(told)) if index not in skip],
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=outlive_termination,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class _Told(Dataset):
    """The batches; an error is handed over as a value, a loader would bury it in a traceback."""

    def __init__(self, batches: Any):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._batches[index]
        except DataError as error:
            return error


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

    def rows(self, places: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Of some samples, each with one of its captions."""
        return self.image[places], self.text[self.first[places] + choices]

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

    def __init__(
        self,
        schedule: Schedule,
        shards: ShardSet,
        table: FeatureTable,
        world: World,
        of_teachers: Mapping[str, FeatureTable] | None = None,
    ):
        self.schedule, self._of_teachers = schedule, of_teachers or {}
        self._table, self._starts = table, shards.starts
        count = schedule.lanes // world.size
        self._mine = range(world.rank * count, (world.rank + 1) * count)
        self._captions = [int(n) for n in table.first.diff()]

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Endless batches from `position` on, each with the position after it."""
        while True:
            epoch, step = position.epoch, position.rows // self.schedule.batch_rows
            streams = self.schedule.streams(epoch, self._mine, step)
            for at in range(step, self.schedule.steps):
                rows: list[tuple[Item, int]] = []
                damaged: list[str] = []
                for items in self.schedule.turns(streams, at):
                    item = self._first_valid(items, damaged)
                    place = self._place(item)
                    key, captions = self._table.keys[place], self._captions[place]
                    picked = self.schedule.pick(key, captions, epoch, item.turn)
                    rows += [(item, choice) for choice in picked]
                position = self.schedule.after(position)
                yield self._batch(rows, damaged), position

    def _place(self, item: Item) -> int:
        return self._starts[item.shard] + item.sample

    def _first_valid(self, items: Iterator[Item], damaged: list[str]) -> Item:
        """The first item whose sample was decoded; where another came before, it is named."""
        for number, item in enumerate(items):
            place = self._place(item)
            if self._table.good[place]:
                return item
            if number == 0:
                damaged.append(f"{self._table.keys[place] or place}: undecodable image")
        raise DataError("a whole lane of data.train cannot be decoded; run mmscale verify")

    def _batch(self, rows: list[tuple[Item, int]], damaged: list[str]) -> Batch:
        table, marks = self._table, self.schedule.marks
        places = torch.tensor([self._place(item) for item, _ in rows])
        choices = torch.tensor([choice for _, choice in rows])
        texts = table.first[places] + choices
        image_ids = table.image_ids[places]
        match_ids = [
            marks.match_id(item.shard, item.sample, image_id)
            for (item, _), image_id in zip(rows, image_ids.tolist(), strict=True)
        ]
        return Batch(
            image=table.image[places],
            tokens=table.text[texts],
            mask=None,
            image_ids=image_ids,
            match_ids=torch.tensor(match_ids),
            labels=torch.tensor([marks.label(item.shard, item.sample) for item, _ in rows]),
            keys=[f"{table.keys[self._place(item)]}#{choice}" for item, choice in rows],
            captions=[table.captions[index] for index in texts.tolist()],
            cut=int(table.cut[texts].sum()),
            damaged=damaged,
            teacher_features={n: t.rows(places, choices) for n, t in self._of_teachers.items()},
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
