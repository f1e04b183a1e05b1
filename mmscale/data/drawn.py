"""A few pairs of a set for each update, which follow from the seed and the update alone."""

import random
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

from mmscale.contracts import Batch, InputSpec
from mmscale.data.damage import DamagedSampleError
from mmscale.data.features import FeatureTable, loaded
from mmscale.data.members import Sample
from mmscale.data.pixels import EvalTransform, decode, stack_rows
from mmscale.data.reader import SampleReader
from mmscale.data.shards import ShardSet
from mmscale.data.stream import pad
from mmscale.errors import DataError

_NONE_DECODED = "no picture of an anchor's data can be decoded; run mmscale verify on it"


class DrawnPairs(Dataset):
    """Item i holds this rank's share of the pairs of update `first + i`.

    Each pass over the set has an order of its own. A picture is seen whole, as in evaluation; a
    damaged one is replaced by the next.
    """

    def __init__(
        self,
        shards: ShardSet,
        spec: InputSpec,
        seed: int,
        rows: int,
        share: slice,
        table: FeatureTable | None = None,
    ):
        """Take a set.

        Args:
            shards: The set.
            spec: What the model is fed.
            seed: The run's.
            rows: Pairs of an update over all ranks.
            share: Which of them are this rank's.
            table: The towers' outputs of the set, which stand in for pictures and tokens.
        """
        self._shards, self._spec, self._seed = shards, spec, seed
        self._rows, self._share, self._table = rows, share, table
        self._transform = EvalTransform(spec)
        self._reader: SampleReader | None = None
        self._order: tuple[int, list[int]] = (-1, [])
        self._updates = range(0)

    def batches(self, updates: range, workers: int) -> Iterator[Batch]:
        """Of consecutive updates, on the CPU.

        Raises:
            DataError: A shard cannot be read, or no picture decoded.
        """
        self._updates = updates
        return loaded(self, workers)

    def __len__(self) -> int:
        return len(self._updates)

    def __getitem__(self, index: int) -> Batch:
        update = self._updates[index]
        first = update * self._rows
        places = [self._place(at) for at in range(first, first + self._rows)][self._share]
        if self._table is not None:
            return self._kept(self._table, update, places)
        samples, pixels, captions = [], [], []
        for place in places:
            sample, picture = self._sample(place)
            choice = self._choice(update, place, len(sample.captions))
            samples.append(sample)
            pixels.append(picture)
            captions.append(sample.captions[choice])
        spec = self._spec
        tokens, mask = pad(spec.tokenize(captions), spec.pad_token, spec.caption_lengths)
        ids = torch.tensor([sample.image_id for sample in samples])
        return Batch(
            image=stack_rows(pixels),
            tokens=tokens,
            mask=mask,
            image_ids=ids,
            match_ids=ids,
            labels=torch.full_like(ids, -1),
            keys=[sample.key for sample in samples],
            captions=captions,
        )

    def _kept(self, table: FeatureTable, update: int, places: list[int]) -> Batch:
        """The same pairs out of a table."""
        count = len(table.keys)
        good = [
            next((o % count for o in range(place, place + count) if table.good[o % count]), None)
            for place in places
        ]
        found = [place for place in good if place is not None]
        if len(found) < len(places):
            raise DataError(_NONE_DECODED)
        captions = table.first.diff().tolist()
        choices = [
            self._choice(update, place, captions[other])
            for place, other in zip(places, found, strict=True)
        ]
        image, text = table.rows(torch.tensor(found), torch.tensor(choices))
        ids = table.image_ids[found]
        texts = [int(table.first[o]) + choice for o, choice in zip(found, choices, strict=True)]
        return Batch(
            image=image,
            tokens=text,
            mask=None,
            image_ids=ids,
            match_ids=ids,
            labels=torch.full_like(ids, -1),
            keys=[table.keys[other] for other in found],
            captions=[table.captions[text] for text in texts],
        )

    def _choice(self, update: int, place: int, captions: int) -> int:
        return random.Random(f"{self._seed}/{update}/{place}").randrange(captions)

    def _place(self, at: int) -> int:
        """Of the pair that is drawn after `at` others since the run's first update."""
        number, place = divmod(at, self._shards.samples)
        if self._order[0] != number:
            order = list(range(self._shards.samples))
            random.Random(f"{self._seed}/{number}").shuffle(order)
            self._order = number, order
        return self._order[1][place]

    def _sample(self, place: int) -> tuple[Sample, torch.Tensor]:
        self._reader = self._reader or SampleReader(self._shards)
        count = self._shards.samples
        for other in range(place, place + count):
            try:
                sample = self._reader.read(*self._shards.sample_at(other % count))
                return sample, self._transform(decode(sample.image, sample.key))
            except DamagedSampleError:
                continue
        raise DataError(_NONE_DECODED)
