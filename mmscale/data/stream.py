"""The training stream: the same ordered rows at every world and worker count.

`TrainStream.batches(position)` is what the loop iterates. Each worker decodes neighbouring lanes of
each batch; the training process lays the workers' parts end to end, which is lane order.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmscale.config.data import DataConfig
from mmscale.config.schema import Config
from mmscale.contracts import Batch, InputSpec, Position, World
from mmscale.data.caption_text import are_cut
from mmscale.data.damage import DamagedSampleError
from mmscale.data.decoded_cache import DecodedCache, Shrinking
from mmscale.data.features import FeatureTable
from mmscale.data.lanes import Item, sections, seeded
from mmscale.data.pixels import TrainTransform, open_picture, stack_rows
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import Schedule
from mmscale.data.shards import ShardSet
from mmscale.data.workers import worker_count
from mmscale.errors import DataError
from mmscale.parallel.signals import outlive_termination
from mmscale.parallel.world import rank_cores

_CPU = torch.device("cpu")


@dataclass
class Share:
    """One worker's part of one batch, decoded: the rows of neighbouring lanes.

    Attributes:
        pixels: None from another process, which hands them over in its `turn`.
        worker: Which process decoded it.
        turn: How many shares that process decoded before.
        rows: Shard, sample and caption of each, by number.
    """

    pixels: Tensor | None = None
    worker: int = 0
    turn: int = 0
    tokens: list[list[int]] = field(default_factory=list)
    teacher_tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    image_ids: list[int] = field(default_factory=list)
    match_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    cut: int = 0
    damaged: list[str] = field(default_factory=list)


class TrainStream:
    """Decodes this rank's rows of every global batch."""

    def __init__(
        self,
        config: Config,
        shards: ShardSet,
        schedule: Schedule,
        spec: InputSpec,
        world: World,
        device: torch.device = _CPU,
        of_teachers: Mapping[str, FeatureTable] | None = None,
    ):
        self.schedule, self._of_teachers = schedule, of_teachers or {}
        self._workers = worker_count(config.data.workers, device, rank_cores(world))
        self._config, self._shards, self._spec, self._world = config, shards, spec, world

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Endless batches from `position` on, each with the position after it."""
        turns = _Turns(self._config, self._shards, self.schedule, self._spec, self._world, position)
        workers = self._workers
        turns.make_room(workers)
        loader = DataLoader(
            turns,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            # Its own generator: the global one must not move when a loader starts.
            generator=torch.Generator(),
            worker_init_fn=outlive_termination,
        )
        shares = (_sound(share) for share in loader if share is not None)
        # One part a worker and batch: a part a lane would cost more to send than to decode.
        while rank_shares := list(islice(shares, min(max(1, workers), turns.lane_count))):
            position = self.schedule.after(position)
            pixels = torch.cat([turns.pixels_of(share) for share in rank_shares])
            for share in rank_shares:
                turns.check(share, share.turn)
            batch = assemble(rank_shares, pixels, self._spec)
            if self._of_teachers:
                batch = replace(batch, teacher_features=self._features(rank_shares))
            yield batch, position

    def _features(self, shares: list[Share]) -> dict[str, tuple[Tensor, Tensor]]:
        rows = [row for share in shares for row in share.rows]
        places = torch.tensor([self._shards.starts[shard] + sample for shard, sample, _ in rows])
        choices = torch.tensor([choice for *_, choice in rows])
        return {name: table.rows(places, choices) for name, table in self._of_teachers.items()}


def assemble(shares: list[Share], pixels: Tensor, spec: InputSpec) -> Batch:
    """A rank's batch from its workers' shares, tokens trimmed to the longest caption at hand."""
    rows = [row for share in shares for row in share.tokens]
    tokens, mask = pad(rows, spec.pad_token, spec.caption_lengths)
    return Batch(
        image=pixels,
        tokens=tokens,
        mask=mask,
        image_ids=torch.tensor([i for share in shares for i in share.image_ids]),
        match_ids=torch.tensor([i for share in shares for i in share.match_ids]),
        labels=torch.tensor([label for share in shares for label in share.labels]),
        keys=[key for share in shares for key in share.keys],
        captions=[caption for share in shares for caption in share.captions],
        cut=sum(share.cut for share in shares),
        damaged=[line for share in shares for line in share.damaged],
        teacher_tokens={
            name: _teacher_tokens(
                [row for share in shares for row in share.teacher_tokens[name]], s
            )
            for name, s in spec.teachers.items()
        },
    )


def _teacher_tokens(rows: list[list[int]], spec: InputSpec) -> Tensor:
    tokens, mask = pad(rows, spec.pad_token, spec.caption_lengths)
    return tokens.masked_fill(~mask, -1)


def _sound(share: Share | DataError) -> Share:
    if isinstance(share, DataError):
        raise share
    return share


def pad(
    rows: list[list[int]], pad_token: int, lengths: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [b t], t the longest row, or the first of `lengths` that is enough."""
    longest = max(map(len, rows))
    longest = next((length for length in lengths if length >= longest), longest)
    tokens = torch.full((len(rows), longest), pad_token)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return tokens, mask


def _decoded_cache(data: DataConfig, spec: InputSpec) -> DecodedCache | None:
    if data.decoded_cache is None:
        return None
    shrinking = Shrinking.for_run(data, spec)
    return DecodedCache(Path(data.decoded_cache), shrinking, data.cache_gb * 1e9)


class _Turns(IterableDataset):
    """A worker's share of each batch; None from a worker that has no lane."""

    def __init__(
        self,
        config: Config,
        shards: ShardSet,
        schedule: Schedule,
        spec: InputSpec,
        world: World,
        position: Position,
    ):
        self._shards, self._schedule, self._spec = shards, schedule, spec
        data, self._cache = config.data, _decoded_cache(config.data, spec)
        picture = self._cache.picture if self._cache else open_picture
        self._transform = TrainTransform(spec, data.augment, data.crop_scale, picture)
        self._position, self._turn = position, 0
        self.lane_count = schedule.lanes // world.size
        self._first_lane = world.rank * self.lane_count
        self._handover: Handover

    def make_room(self, workers: int) -> None:
        """Memory for what so many workers hand over, before they are started."""
        rows = self._schedule.lane_items * self._schedule.rows_per_item
        parts = sections(self.lane_count, workers) if workers else []
        self._handover = Handover([rows * len(lanes) for lanes in parts], self._spec.image_size)

    def pixels_of(self, share: Share) -> Tensor:
        """The rows of a share: to be copied before the next batch is asked for."""
        if share.pixels is not None:
            return share.pixels
        return self._handover.get(share.worker, share.turn)

    def check(self, share: Share, row: int) -> None:
        """Each row is one sample's: all pixels, and the tokens of one row, another each time."""
        if share.pixels is None:
            check_pixels(share.keys, self._handover.stamps(share.worker, share.turn))
        check_tokens(row, share.keys, share.captions, share.tokens, self._spec)
        for name, spec in self._spec.teachers.items():
            check_tokens(row, share.keys, share.captions, share.teacher_tokens[name], spec)

    def __iter__(self) -> Iterator[Share | DataError | None]:
        try:
            yield from self._shares()
        except DataError as error:
            # Handed over as a value: a loader would bury the sentence in its own traceback.
            yield error

    def _shares(self) -> Iterator[Share | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part = sections(self.lane_count, workers)[worker]
        reader = SampleReader(self._shards, self._schedule.buffer * len(part))
        epoch, rows = self._position.epoch, self._position.rows
        mine = range(self._first_lane + part.start, self._first_lane + part.stop)
        while True:
            if self._cache:
                self._cache.renew()
            yield from self._epoch(mine, epoch, rows // self._schedule.batch_rows, reader)
            epoch, rows = epoch + 1, 0

    def _epoch(
        self, mine: Sequence[int], epoch: int, step: int, reader: SampleReader
    ) -> Iterator[Share | None]:
        """This worker's share of each batch."""
        streams = [
            (lane, reader.ahead(items)) for lane, items in self._schedule.streams(epoch, mine, step)
        ]
        for at in range(step, self._schedule.steps):
            turns = self._schedule.turns(streams, at)
            yield self._handed_over(*self._share(turns, epoch, reader)) if turns else None

    def _handed_over(self, share: Share, images: list[Tensor]) -> Share:
        if (info := get_worker_info()) is None:
            share.pixels = stack_rows(images)
            return share
        share.worker, share.turn = info.id, self._turn
        stamps = [stamp(key) for key in share.keys]
        self._handover.put(share.worker, share.turn, images, stamps)
        self._turn += 1
        return share

    def _share(
        self, turns: list[Iterator[Item]], epoch: int, reader: SampleReader
    ) -> tuple[Share, list[Tensor]]:
        """The rows of some turns, and their pixels."""
        share = Share()
        images: list[Tensor] = []
        for items in turns:
            images += self._add_first(share, items, epoch, reader)
        share.tokens = self._spec.tokenize(share.captions)
        for name, spec in self._spec.teachers.items():
            share.teacher_tokens[name] = spec.tokenize(share.captions)
        share.cut = sum(are_cut(self._spec, share.captions, share.tokens))
        return share, images

    def _add_first(
        self, share: Share, items: Iterator[Item], epoch: int, reader: SampleReader
    ) -> list[Tensor]:
        """Add rows of the first valid sample, and what is wrong with the one before the others."""
        damage: list[str] = []
        for item in items:
            try:
                images = self._add_rows(share, item, epoch, reader)
            except DamagedSampleError as error:
                damage.append(str(error))
                continue
            share.damaged += damage[:1]
            return images
        raise DataError(
            f"no sample of a whole lane of data.train can be used, the first {damage[0]}; "
            "run mmscale verify"
        )

    def _add_rows(self, share: Share, item: Item, epoch: int, reader: SampleReader) -> list[Tensor]:
        """Add a sample's rows to a share; their pixels."""
        sample = reader.take(item)
        marks, seed = self._schedule.marks, self._schedule.seed
        counts = (len(sample.captions), epoch, item.turn)
        choices = self._schedule.pick(sample.key, *counts, shares=sample.shares)
        keys = [f"{sample.key}#{choice}" for choice in choices]
        # The crop repeats on resume and at any worker: it is drawn from the row, not in turn.
        lap = (item.lap,) if item.lap else ()
        seeds = [seeded(seed, epoch, key, "crop", *lap) for key in keys]
        images = self._transform(sample.image, sample.key, seeds)
        match_id = marks.match_id(item.shard, item.sample, sample.image_id)
        label = marks.label(item.shard, item.sample, sample.class_number)
        share.keys += keys
        share.rows += [(item.shard, item.sample, choice) for choice in choices]
        share.captions += [sample.captions[choice] for choice in choices]
        share.image_ids += [sample.image_id] * len(keys)
        share.match_ids += [match_id] * len(keys)
        share.labels += [label] * len(keys)
        return images


# Shares that a loader asks a worker for in advance.
PREFETCH = 2
# A worker is asked for a share when the one `PREFETCH` before it is handed out, and by then the
# share before that one has been copied into its batch: its memory is free.
_SLOTS = PREFETCH + 1


class Handover:
    """Memory through which workers hand their rows to the training process, taken once and reused.

    Fresh shared memory for each share would cost a page fault for every 4 KiB on both sides: as
    much as a tenth of the decoding.

    Args:
        rows: Rows in each share of each worker.
        side: Of the square images, pixels.
    """

    def __init__(self, rows: Sequence[int], side: int):
        self._slots = [
            torch.empty(_SLOTS, count, side, side, 3, dtype=torch.uint8).share_memory_()
            for count in rows
        ]
        self._stamps = [
            torch.zeros(_SLOTS, count, dtype=torch.int64).share_memory_() for count in rows
        ]

    def put(
        self,
        worker: int,
        turn: int,
        images: Sequence[UInt8[Tensor, "3 h w"]],
        stamps: Sequence[int],
    ) -> None:
        """Write the rows of a worker's `turn`-th share, each with what tells whose it is."""
        self._stamps[worker][turn % _SLOTS] = torch.tensor(stamps)
        torch.stack([image.permute(1, 2, 0) for image in images], out=self._slot(worker, turn))

    def get(self, worker: int, turn: int) -> UInt8[Tensor, "b 3 h w"]:
        """The rows of a share: to be copied before the worker's next share is asked for."""
        return self._slot(worker, turn).permute(0, 3, 1, 2)

    def stamps(self, worker: int, turn: int) -> Int64[Tensor, " b"]:
        """What came with these rows; to be read when they have been copied."""
        return self._stamps[worker][turn % _SLOTS].clone()

    def _slot(self, worker: int, turn: int) -> Tensor:
        return self._slots[worker][turn % _SLOTS]


# Pixels cross from the workers through memory that is used again, everything else through a queue,
# and tokens are made for a whole share at once: each could deal captions to other images, and no
# figure of the batch would show it. So every batch is checked.


def stamp(key: str) -> int:
    """What travels with a row's pixels."""
    return zlib.crc32(key.encode())


def check_pixels(keys: Sequence[str], stamps: Int64[Tensor, " b"]) -> None:
    """Compare what came with the pixels with the rows' keys."""
    wrong = [key for key, mark in zip(keys, stamps.tolist(), strict=True) if mark != stamp(key)]
    assert not wrong, f"{len(wrong)} rows have another sample's pixels, the first {wrong[0]}"


def check_tokens(
    row: int,
    keys: Sequence[str],
    captions: Sequence[str],
    tokens: Sequence[list[int]],
    spec: InputSpec,
) -> None:
    """Tokenise one row's caption again, alone."""
    row %= len(keys)
    assert spec.tokenize([captions[row]])[0] == tokens[row], (
        f"{keys[row]} has tokens that its caption alone does not give"
    )
