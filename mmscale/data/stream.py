"""The training stream: the same ordered rows at every world and worker count.

`TrainStream.batches(position)` is what the loop iterates. Workers decode whole lane shares; the
training process puts a batch together from its lanes' shares in lane order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmscale.config.schema import Config
from mmscale.contracts import Batch, InputSpec, Position, World
from mmscale.data.lanes import Item, Lane, Tape, seeded, turns_of
from mmscale.data.shards import DamagedSampleError, SampleReader, ShardSet
from mmscale.data.transform import decode, normalise, train_transform
from mmscale.dist.signals import outlive_termination
from mmscale.errors import ConfigError, DataError


@dataclass(frozen=True)
class Schedule:
    """Which items make up which batch; shared by the decoding and the cached stream.

    Attributes:
        captions: For each shard, each sample's number of captions.
        choice: `random`, `first`, `flat`, or captions an image.
        seed: The run's seed.
        lanes: Lanes of an epoch.
        lane_items: Items a lane gives to each batch.
        buffer: Samples that one lane holds for shuffling.
    """

    captions: list[tuple[int, ...]]
    choice: str | int
    seed: int
    lanes: int
    lane_items: int
    buffer: int

    @property
    def rows_per_item(self) -> int:
        """Rows that one sample's turn gives."""
        return self.choice if isinstance(self.choice, int) else 1

    @property
    def items(self) -> int:
        """Turns of an epoch, the remainder included."""
        counts = [count for shard in self.captions for count in shard]
        return sum(counts) if self.choice == "flat" else len(counts)

    @property
    def steps(self) -> int:
        """Full batches of an epoch."""
        return self.items // (self.lanes * self.lane_items)

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""
        return self.lanes * self.lane_items * self.rows_per_item

    def epoch(self, epoch: int) -> list[Lane]:
        """The lanes of one epoch."""
        tape = Tape(turns_of(self.captions, self.choice == "flat"), self.seed, epoch)
        length = self.steps * self.lane_items
        return [
            Lane(tape, index, length, self.buffer, self.seed, epoch) for index in range(self.lanes)
        ]

    def pick(self, key: str, captions: int, epoch: int, turn: int) -> list[int]:
        """Which captions of a sample are its rows in this turn."""
        if self.choice == "first":
            return [0]
        start = seeded(self.seed, epoch if self.choice != "flat" else "flat", key, "caption")
        if self.choice == "flat":
            return [(start + turn) % captions]
        return [(start + offset) % captions for offset in range(self.rows_per_item)]

    def after(self, position: Position) -> Position:
        """The position one batch later."""
        rows = position.rows + self.batch_rows
        if rows >= self.steps * self.batch_rows:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, rows)


def plan_schedule(config: Config, captions: list[tuple[int, ...]], lanes: int) -> Schedule:
    """The order of a run's data.

    Raises:
        ConfigError: The data does not fill one batch.
    """
    choice = config.data.captions
    per_item = choice if isinstance(choice, int) else 1
    schedule = Schedule(
        captions,
        choice,
        config.run.seed,
        lanes,
        config.train.global_batch_size // per_item // lanes,
        max(1, config.data.shuffle_buffer // lanes),
    )
    if schedule.steps == 0:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} is more than the "
            f"{schedule.items * per_item} rows of data.train={config.data.train}; lower it"
        )
    return schedule


@dataclass
class Share:
    """One lane's part of one batch, decoded."""

    pixels: Tensor | None
    tokens: list[list[int]] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class TrainStream:
    """Decodes this rank's rows of every global batch."""

    def __init__(
        self, config: Config, shards: ShardSet, schedule: Schedule, spec: InputSpec, world: World
    ):
        self.schedule = schedule
        self._config, self._shards, self._spec, self._world = config, shards, spec, world

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Endless batches from `position` on, each with the position after it."""
        turns = _Turns(self._config, self._shards, self.schedule, self._spec, self._world, position)
        workers = self._config.data.workers
        loader = DataLoader(
            turns,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, 2 * turns.lane_count // workers) if workers else None,
            # Its own generator: the global one must not move when a loader starts.
            generator=torch.Generator(),
            worker_init_fn=outlive_termination,
        )
        shares = (_sound(share) for share in loader if share is not None)
        while rank_shares := list(islice(shares, turns.lane_count)):
            position = self.schedule.after(position)
            yield assemble(rank_shares, self._spec), position


def assemble(shares: list[Share], spec: InputSpec) -> Batch:
    """A rank's batch from its lanes' shares, tokens trimmed to the longest caption at hand."""
    tokens, mask = pad([row for share in shares for row in share.tokens], spec.pad_token)
    image_ids = torch.tensor([i for share in shares for i in share.image_ids])
    pixels = torch.cat([share.pixels for share in shares if share.pixels is not None])
    return Batch(
        image=normalise(pixels, spec),
        tokens=tokens,
        mask=mask,
        image_ids=image_ids,
        match_ids=image_ids,
        labels=torch.full_like(image_ids, -1),
        keys=[key for share in shares for key in share.keys],
        captions=[caption for share in shares for caption in share.captions],
        damaged=[line for share in shares for line in share.damaged],
    )


def _sound(share: Share | DataError) -> Share:
    if isinstance(share, DataError):
        raise share
    return share


def pad(rows: list[list[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [b t], t the longest row."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad_token)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return tokens, mask


class _Turns(IterableDataset):
    """A worker's lane shares, in turn; None where a worker has no lane left in a round."""

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
        self._transform = train_transform(spec, config.data.augment, config.data.crop_scale)
        self._position = position
        self.lane_count = schedule.lanes // world.size
        self._first_lane = world.rank * self.lane_count

    def __iter__(self) -> Iterator[Share | DataError | None]:
        try:
            yield from self._shares()
        except DataError as error:
            # Handed over as a value: a loader would bury the sentence in its own traceback.
            yield error

    def _shares(self) -> Iterator[Share | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = SampleReader(self._shards)
        epoch, rows = self._position.epoch, self._position.rows
        while True:
            lanes = self._schedule.epoch(epoch)
            mine = [
                lanes[self._first_lane + turn * workers + worker]
                if turn * workers + worker < self.lane_count
                else None
                for turn in range(-(-self.lane_count // workers))
            ]
            yield from self._epoch(mine, epoch, rows // self._schedule.batch_rows, reader)
            epoch, rows = epoch + 1, 0

    def _epoch(
        self, lanes: list[Lane | None], epoch: int, step: int, reader: SampleReader
    ) -> Iterator[Share | None]:
        count = self._schedule.lane_items
        streams = [None if lane is None else lane.items(step * count) for lane in lanes]
        for at in range(step, self._schedule.steps):
            for lane, items in zip(lanes, streams, strict=True):
                if lane is None or items is None:
                    yield None
                    continue
                yield self._share(lane, list(islice(items, count)), at * count, epoch, reader)

    def _share(
        self, lane: Lane, items: list[Item], start: int, epoch: int, reader: SampleReader
    ) -> Share:
        share, pixels = Share(None), []
        for offset, item in enumerate(items):
            try:
                rows = self._rows(item, epoch, reader)
            except DamagedSampleError as error:
                rows = self._nearest(lane, start + offset, epoch, reader, str(error))
                share.damaged.append(str(error))
            for image, key, caption, image_id in rows:
                pixels.append(image)
                share.keys.append(key)
                share.captions.append(caption)
                share.image_ids.append(image_id)
        share.tokens = self._spec.tokenize(share.captions)
        share.pixels = torch.stack(pixels)
        return share

    def _rows(
        self, item: Item, epoch: int, reader: SampleReader
    ) -> list[tuple[Tensor, str, str, int]]:
        sample = reader.read(item.shard, item.sample)
        pixels = decode(sample.image, sample.key)
        rows = []
        for choice in self._schedule.pick(sample.key, len(sample.captions), epoch, item.turn):
            key = f"{sample.key}#{choice}"
            # The crop repeats on resume and at any worker: it is drawn from the row, not in turn.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded(self._schedule.seed, epoch, key, "crop"))
                image = self._transform(pixels)
            rows.append((image, key, sample.captions[choice], sample.image_id))
        return rows

    def _nearest(
        self, lane: Lane, place: int, epoch: int, reader: SampleReader, reason: str
    ) -> list[tuple[Tensor, str, str, int]]:
        """Rows of the nearest earlier good sample of the lane, or of the first later one."""
        for item in lane.around(place):
            try:
                return self._rows(item, epoch, reader)
            except DamagedSampleError:
                continue
        raise DataError(
            f"no sample of a whole lane of data.train can be used, the first {reason}; "
            "run mmscale verify"
        )
