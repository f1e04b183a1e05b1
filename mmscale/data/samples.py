"""Every image of a set once, with its captions, in manifest order: for evaluation and caches."""

import bisect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmscale.contracts import InputSpec
from mmscale.data.caption_text import are_cut
from mmscale.data.damage import DamagedSampleError
from mmscale.data.decode import decode
from mmscale.data.reader import SampleReader
from mmscale.data.shards import ShardSet
from mmscale.data.transform import EvalTransform, stack_rows
from mmscale.errors import DataError
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
        self._starts = [0, *accumulate(shard.samples for shard in shards.shards)]
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
            shard = bisect.bisect_right(self._starts, place) - 1
            try:
                sample = self._reader.read(shard, place - self._starts[shard])
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
        loader = DataLoader(
            _Told(self),
            batch_size=None,
            sampler=[index for index in range(len(self)) if index not in skip],
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

    def __init__(self, batches: SampleBatches):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> SampleBatch | DataError:
        try:
            return self._batches[index]
        except DataError as error:
            return error
