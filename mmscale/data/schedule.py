"""Which items make up which batch: the order of a run's data, without reading a sample."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, chain, islice, tee
from typing import TypeAlias

import numpy as np

from mmscale.config.data import DataConfig, weighted
from mmscale.config.rules import labelled_kinds
from mmscale.config.schema import Config
from mmscale.config.values import Duration, Ramp
from mmscale.contracts import NamedTensor, Position
from mmscale.data.arrange import Arrangement, Neighbours
from mmscale.data.grouping import Identities, Marks, read_marks, require_identities
from mmscale.data.lanes import Item, Lane, Tape, WeightedShards, seeded, turns_of
from mmscale.data.resampled import Resampling, SequentialLane, plan_resampling
from mmscale.data.shards import ShardSet
from mmscale.errors import ConfigError, DataError

AnyLane: TypeAlias = Lane | SequentialLane


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
        sources: How many of the shards each source has, and its weight; none: one source.
        resampling: Draws shards instead of taking each once.
        marks: Match ids and labels of the samples.
        arrangement: Builds batches on purpose; None leaves them as the lanes give them.
        neighbours: The table of hard batches.
        hard_share: Course of the arrangement's `hard_share` over all batches; None: it stays.
    """

    captions: Sequence[Sequence[int]]
    choice: str | int
    seed: int
    lanes: int
    lane_items: int
    buffer: int
    sources: tuple[tuple[int, float], ...] = ()
    resampling: Resampling | None = None
    marks: Marks = field(default_factory=Marks)
    arrangement: Arrangement | None = None
    neighbours: Neighbours | None = None
    hard_share: Ramp | None = None

    @property
    def rows_per_item(self) -> int:
        """Rows that one sample's turn gives."""
        return self.choice if isinstance(self.choice, int) else 1

    @cached_property
    def items(self) -> int:
        """Turns of an epoch, the remainder included."""
        if self.resampling:
            return self.resampling.epoch_samples
        return sum(source.items for source in self.parts)

    @cached_property
    def parts(self) -> list[WeightedShards]:
        """What an epoch is made of."""
        turns = iter(turns_of(self.captions, self.choice == "flat"))
        sources = self.sources or ((len(self.captions), 1.0),)
        return [WeightedShards(list(islice(turns, shards)), weight) for shards, weight in sources]

    @property
    def steps(self) -> int:
        """Full batches of an epoch."""
        return self.items // (self.lanes * self.lane_items)

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""
        return self.lanes * self.lane_items * self.rows_per_item

    def epoch(self, epoch: int) -> list[Lane] | list[SequentialLane]:
        """The lanes of one epoch."""
        length = self.steps * self.lane_items
        if self.resampling:
            return self.resampling.lanes(self.lanes, length, self.buffer, self.seed, epoch)
        tape = Tape(self.parts, self.seed, epoch)
        return [
            Lane(tape, index, length, self.buffer, self.seed, epoch) for index in range(self.lanes)
        ]

    def streams(
        self, epoch: int, mine: Sequence[int], step: int
    ) -> list[tuple[AnyLane, Iterator[Item]]]:
        """Some lanes of an epoch, each with its items from batch `step` on."""
        lanes = self.epoch(epoch)
        if self.arrangement is None:
            return [(lanes[lane], lanes[lane].items(step * self.lane_items)) for lane in mine]
        # Every lane takes part in a batch that is built, so each worker follows all of them.
        batches = tee(self._arranged(self.arrangement, lanes, epoch, step), len(mine))
        return [
            (lanes[lane], self._part(lane, whole))
            for lane, whole in zip(mine, batches, strict=True)
        ]

    def turns(
        self, streams: Sequence[tuple[AnyLane, Iterator[Item]]], batch: int
    ) -> list[Iterator[Item]]:
        """Each item of a batch, followed by those that may stand in for it, nearest first.

        Args:
            streams: What `streams` gave, read up to this batch.
            batch: Its number in the epoch.
        """
        return [
            chain([item], lane.around(batch * self.lane_items + offset))
            for lane, items in streams
            for offset, item in enumerate(islice(items, self.lane_items))
        ]

    def _arranged(
        self, arrangement: Arrangement, lanes: Sequence[AnyLane], epoch: int, step: int
    ) -> Iterator[list[Item]]:
        steps_of = partial(
            Duration.steps, steps_per_epoch=self.steps, global_batch_size=self.batch_rows
        )
        windows = [part for part in arrangement.windows(self.steps) if part.stop > step]
        start = windows[0].start
        streams = [lane.items(start * self.lane_items) for lane in lanes]
        for window in windows:
            batches = [
                [item for stream in streams for item in islice(stream, self.lane_items)]
                for _ in window
            ]
            if self.hard_share is not None:
                share = self.hard_share.at(epoch * self.steps + window.start, steps_of)
                arrangement = replace(arrangement, hard_share=share)
            yield from arrangement.arrange(batches)[max(0, step - window.start) :]

    def _part(self, lane: int, batches: Iterator[list[Item]]) -> Iterator[Item]:
        """One lane's items of whole batches."""
        for batch in batches:
            yield from batch[lane * self.lane_items : (lane + 1) * self.lane_items]

    @property
    def with_neighbours(self) -> float:
        """Share of the samples that the table of hard batches knows neighbours of."""
        if self.arrangement is None or self.arrangement.neighbours is None:
            return 0.0
        return float((self.arrangement.neighbours >= 0).any(axis=1).mean())

    def tensors(self) -> Iterator[NamedTensor]:
        """What a checkpoint must hold for the order to go on as it began."""
        if self.neighbours is not None:
            for name, value in self.neighbours.tensors().items():
                yield NamedTensor(f"hard_batches.{name}", value, {})

    def pick(
        self,
        key: str,
        captions: int,
        epoch: int,
        turn: int,
        *,
        shares: Sequence[tuple[int, float]] = (),
    ) -> list[int]:
        """Which captions of a sample are its rows in this turn; `shares` as in `Sample`."""
        if self.choice == "first":
            return [0]
        if shares and self.choice != "flat":
            first, count = _drawn(shares, seeded(self.seed, epoch, key, "json", turn))
            return [first + place for place in self.pick(key, count, epoch, turn)]
        start = seeded(self.seed, epoch if self.choice != "flat" else "flat", key, "caption")
        if self.choice == "flat":
            return [(start + turn) % captions]
        start += turn * self.rows_per_item
        return [(start + offset) % captions for offset in range(self.rows_per_item)]

    def after(self, position: Position) -> Position:
        """The position one batch later."""
        rows = position.rows + self.batch_rows
        if rows >= self.steps * self.batch_rows:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, rows)


def _drawn(shares: Sequence[tuple[int, float]], number: int) -> tuple[int, int]:
    """First caption and number of captions of the place that a 63-bit number draws."""
    edges = list(accumulate(share for _, share in shares))
    place = min(bisect_right(edges, number / 2**63 * edges[-1]), len(edges) - 1)
    return sum(count for count, _ in shares[:place]), shares[place][0]


def _check_captions(data: DataConfig, shards: ShardSet) -> None:
    if data.captions in ("first", "flat"):
        if any(share is not None for _, share in map(weighted, (*data.keys.text, *data.keys.json))):
            raise ConfigError(
                f"data.keys ({data.keys.words}): data.captions={data.captions} draws none of them; "
                "leave the shares out"
            )
    elif data.feature_cache is not None and any(choice.draws for choice in shards.choices):
        raise ConfigError(
            "data.feature_cache: keeps captions without the shares that data.keys draws them by; "
            "leave it out, index one place of captions, or set data.captions=flat"
        )
    if not isinstance(data.captions, int) or not shards.shards:
        return
    most = max(max(shard.captions, default=0) for shard in shards.shards)
    if data.captions > most:
        raise ConfigError(
            f"data.captions={data.captions}: no image of data.train={data.train} has more than "
            f"{most} captions, so that each would come with the same one more than once; lower it"
        )


def plan_schedule(
    config: Config, shards: ShardSet, lanes: int, neighbours: Neighbours | None = None
) -> Schedule:
    """The order of a run's data.

    Args:
        config: The run.
        shards: The training set.
        lanes: Lanes of an epoch.
        neighbours: The table of hard batches; None leaves batches without.

    Raises:
        ConfigError: The data does not fill one batch, or no order keeps its groups apart.
        DataError: The manifests do not hold what the settings need.
    """
    _check_captions(config.data, shards)
    schedule = Schedule(
        [shard.captions for shard in shards.shards],
        config.data.captions,
        config.run.seed,
        lanes,
        config.train.global_batch_size // config.data.rows_per_item // lanes,
        max(1, config.data.shuffle_buffer // lanes),
        shards.sources,
        plan_resampling(config.data, shards) if config.data.resampled else None,
    )
    if schedule.steps == 0:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} is more than the "
            f"{schedule.items * schedule.rows_per_item} rows of data.train={config.data.train}; "
            "lower it"
        )
    for number, source in enumerate(schedule.parts):
        if source.items == 0 and not config.data.resampled:
            raise ConfigError(
                f"data.train, source {number}: weight={source.weight} of its {source.lap_items} "
                "images is not one; raise the weight or leave the source out"
            )
    identities = [shard.identities for shard in shards.shards]
    schedule = replace(schedule, marks=read_marks(config.data.match, identities))
    if (kinds := labelled_kinds(config)) and not config.data.resampled:
        if shards.labels_clash:
            raise DataError(
                "data.train: labels have names in one source and are bare numbers in another, so "
                "that nothing tells which are the same; label all sources in one way"
            )
        _require_labels(kinds, schedule.marks, config.model.fusion.classes)
    if config.data.positive_share is None and neighbours is None:
        return schedule
    share = config.data.hard_batches.share
    schedule = replace(schedule, neighbours=neighbours, hard_share=share)
    return replace(schedule, arrangement=_plan_arrangement(config, shards, schedule))


def _require_labels(kinds: list[str], marks: Marks, classes: int | None) -> None:
    largest = max((max(part, default=-1) for part in marks.labels if part is not None), default=-1)
    if largest < 0:
        raise DataError(
            f"loss.terms has {kinds[0]}, but no image of data.train has a label; give its table "
            "a column `label` and pack it again, or run mmscale index on shards whose KEY.json has "
            "`label`"
        )
    if classes is not None and largest >= classes:
        raise ConfigError(
            f"model.fusion.classes={classes}, but data.train has the label {largest}; set it to "
            f"{largest + 1} or more"
        )


def _plan_arrangement(config: Config, shards: ShardSet, schedule: Schedule) -> Arrangement:
    data, steps, neighbours = config.data, schedule.steps, schedule.neighbours
    setting = "data.hard_batches" if data.positive_share is None else "data.positive_share"
    known = require_identities(setting, [shard.identities for shard in shards.shards])
    groups = schedule.marks.match or [part.images for part in known]
    width = data.hard_batches.window
    if data.positive_share is not None:
        turns: Counter[int] = Counter()
        weights = [weight for count, weight in shards.sources for _ in range(count)]
        for shard, ids, weight in zip(shards.shards, groups, weights, strict=True):
            for group, captions in zip(ids, shard.captions, strict=True):
                turns[group] += math.ceil(weight) * (captions if data.captions == "flat" else 1)
        largest = max(turns.values())
        if data.positive_share == 0 and largest > steps:
            raise ConfigError(
                f"data.positive_share=0, but {largest} images of one group (data.match="
                f"{data.match}) cannot be kept apart in the {steps} batches of an epoch; lower "
                "train.global_batch_size or leave data.positive_share unset"
            )
        width = max(width, largest)
    return Arrangement(
        width=width,
        samples=tuple(shard.samples for shard in shards.shards),
        groups=[group for part in groups for group in part],
        positive_share=data.positive_share,
        neighbours=None if neighbours is None else _places(neighbours, known),
    )


def _places(neighbours: Neighbours, known: Sequence[Identities]) -> np.ndarray:
    places = neighbours.places(np.array([i for part in known for i in part.images], np.int64))
    if not (places >= 0).any():
        raise DataError(
            "data.hard_batches.table names no two images of data.train; make it from the "
            "embeddings of these very shards (mmscale embed RUN --data SHARDS --out F.npz)"
        )
    return places
