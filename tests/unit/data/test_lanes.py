"""The order of the data is a function of seed, epoch and manifest, and loses nothing."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.contracts import Position
from mmscale.data.lanes import Lane, Tape, WeightedShards, sections, turns_of
from mmscale.data.schedule import Schedule


def schedule(captions, choice="random", lanes=2, lane_items=2, buffer=4, seed=0, sources=()):
    return Schedule(captions, choice, seed, lanes, lane_items, buffer, sources)


def global_batches(plan: Schedule, epoch: int, world: int = 1, workers: int = 1, start: int = 0):
    """Every batch from `start` on as rows in order, put together from ranks and workers."""
    per_rank = plan.lanes // world
    parts = [
        plan.streams(epoch, range(rank * per_rank + part.start, rank * per_rank + part.stop), start)
        for rank in range(world)
        for part in sections(per_rank, max(1, workers))
    ]
    return [
        [
            item
            for streams in parts
            for _, stream in streams
            for item in islice(stream, plan.lane_items)
        ]
        for _ in range(start, plan.steps)
    ]


shard_sizes = st.lists(st.integers(0, 23), min_size=1, max_size=9)
weights = st.one_of(st.integers(1, 3).map(float), st.floats(0.05, 3.5))


@st.composite
def plans(draw, weighted=False):
    """Arguments of a schedule: any shards of one source or several, cut into any lanes."""
    parts = draw(st.lists(st.tuples(shard_sizes, weights), min_size=1, max_size=4))
    if not weighted:
        parts = [(parts[0][0], 1.0)]
    sizes = [size for sizes, _ in parts for size in sizes]
    return {
        "captions": [(5,) * size for size in sizes],
        "lanes": draw(st.integers(1, 12)),
        "lane_items": draw(st.integers(1, 4)),
        "buffer": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 9)),
        "sources": tuple((len(sizes), weight) for sizes, weight in parts),
    }


def divisors(number):
    return [part for part in range(1, number + 1) if number % part == 0]


@settings(max_examples=80, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 3))
def test_each_sample_once_and_only_the_remainder_sits_out(plan, epoch):
    plan = schedule(**plan)
    rows = [item for batch in global_batches(plan, epoch) for item in batch]
    size = plan.lanes * plan.lane_items
    assert len(rows) == len(set(rows)) == plan.steps * size
    assert sum(map(len, plan.captions)) - len(rows) < size
    assert all(item.sample < len(plan.captions[item.shard]) for item in rows)
    assert all(item.turn == item.lap == 0 for item in rows)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), weighted=st.booleans(), epoch=st.integers(0, 2), workers=st.integers(0, 5))
def test_any_world_and_workers_make_the_same_ordered_batches(data, weighted, epoch, workers):
    plan = schedule(**data.draw(plans(weighted)))
    world = data.draw(st.sampled_from(divisors(plan.lanes)))
    whole = global_batches(plan, epoch)
    assert global_batches(plan, epoch, world, workers) == whole
    assert all(len(batch) == plan.lanes * plan.lane_items for batch in whole)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), weighted=st.booleans(), workers=st.integers(0, 3))
def test_going_on_at_any_position_gives_the_tail(data, weighted, workers):
    plan = schedule(**data.draw(plans(weighted)))
    world = data.draw(st.sampled_from(divisors(plan.lanes)))
    start = data.draw(st.integers(0, plan.steps))
    assert global_batches(plan, 1, world, workers, start) == global_batches(plan, 1)[start:]


@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(st.tuples(shard_sizes, weights), min_size=1, max_size=4),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_each_sample_as_often_as_its_weight_says(parts, epoch, seed):
    """The whole part of the weight always; of the fraction, that share of the samples."""
    sizes = [size for sizes, _ in parts for size in sizes]
    sources = tuple((len(sizes), weight) for sizes, weight in parts)
    plan = schedule([(5,) * size for size in sizes], "random", 1, 1, 9, seed, sources)
    rows = [item for batch in global_batches(plan, epoch) for item in batch]
    assert len(rows) == len(set(rows))
    seen = Counter((item.shard, item.sample) for item in rows)
    first = 0
    for shards, weight in parts:
        places = [
            (first + shard, sample) for shard, size in enumerate(shards) for sample in range(size)
        ]
        times = Counter(seen[place] for place in places)
        once_more = times[int(weight) + 1]
        assert times[int(weight)] + once_more == len(places)
        assert once_more == pytest.approx((weight - int(weight)) * len(places), abs=0.5001)
        first += len(shards)


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(1, 60), weights), min_size=2, max_size=4))
def test_any_stretch_of_the_tape_holds_each_sources_share(parts):
    sources = [
        WeightedShards(turns_of([(1,) * size], flat=False), weight) for size, weight in parts
    ]
    tape = Tape(sources, seed=1, epoch=2)
    shards = [tape[place].shard for place in range(len(tape))]
    for low in range(0, len(shards), 7):
        for high in range(low, len(shards) + 1, 5):
            for number, source in enumerate(sources):
                share = source.items / len(tape) * (high - low)
                # One item for each source dealt out before it, and one where the ring closes.
                assert abs(shards[low:high].count(number) - share) <= len(sources) + 1


def test_passes_of_a_source_come_one_after_another():
    """A sample comes again only after every other of its source: never twice in a batch."""
    tape = Tape(
        [WeightedShards(turns_of([(1,) * 20, (1,) * 12], flat=False), 3.0)], seed=3, epoch=1
    )
    items = [tape[place] for place in range(len(tape))]
    start = next(place for place in range(32) if items[place].lap != items[place - 1].lap)
    ring = items[start:] + items[:start]
    for lap in range(3):
        part = ring[lap * 32 : (lap + 1) * 32]
        assert len({(item.shard, item.sample) for item in part}) == 32
        assert len({item.lap for item in part}) == 1


def test_a_fraction_is_another_part_each_epoch_and_comes_round():
    plan = schedule([(1,) * 20, (1,) * 20], lanes=1, lane_items=1, sources=((2, 0.25),))
    parts = [
        frozenset((i.shard, i.sample) for batch in global_batches(plan, epoch) for i in batch)
        for epoch in range(60)
    ]
    assert {len(part) for part in parts} == {10}
    # Neighbouring samples of freshly shuffled shards, from any place on.
    assert len(set(parts)) > 20
    seen = Counter(place for part in parts for place in part)
    assert len(seen) == 40
    assert 5 <= min(seen.values()) <= max(seen.values()) <= 27


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=5),
    epoch=st.integers(0, 2),
    weight=st.integers(1, 3),
)
def test_flat_gives_every_caption_as_often_as_its_source_weighs(counts, epoch, weight):
    sources = ((len(counts), float(weight)),)
    plan = schedule([tuple(c) for c in counts], "flat", 1, 1, 5, 0, sources)
    picked = Counter()
    for item in (item for batch in global_batches(plan, epoch) for item in batch):
        key = f"{item.shard}-{item.sample}"
        captions = counts[item.shard][item.sample]
        picked.update((key, choice) for choice in plan.pick(key, captions, epoch, item.turn))
    assert len(picked) == sum(map(sum, counts))
    assert set(picked.values()) <= {weight}


@pytest.mark.parametrize("choice", ["random", 2])
def test_a_sample_that_comes_again_brings_other_captions(choice):
    plan = schedule([(6,) * 10], choice, 1, 1, 5, 0, ((1, 3.0),))
    picked = Counter()
    for item in (item for batch in global_batches(plan, 0) for item in batch):
        picked.update((item.sample, caption) for caption in plan.pick("k", 6, 0, item.turn))
    assert set(picked.values()) == {1}


def test_the_order_differs_each_epoch_and_each_seed():
    orders = {
        tuple(
            item
            for batch in global_batches(schedule([(1,) * 40], seed=seed), epoch)
            for item in batch
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_the_remainder_is_another_one_each_epoch():
    plan = schedule([(1,) * 41], lanes=5, lane_items=4)
    everything = {(0, sample) for sample in range(41)}
    left_out = {
        frozenset(
            everything
            - {(i.shard, i.sample) for batch in global_batches(plan, epoch) for i in batch}
        )
        for epoch in range(8)
    }
    assert all(len(part) == 1 for part in left_out)
    assert len(left_out) > 3


def test_lanes_may_cut_a_shard():
    tape = Tape([WeightedShards(turns_of([(1,) * 10], flat=False))], 0, 0)
    lanes = [Lane(tape, index, 5, 1, 0, 0) for index in range(2)]
    samples = [[item.sample for item in lane.items()] for lane in lanes]
    assert sorted(samples[0] + samples[1]) == list(range(10))
    assert set(samples[0]) & set(samples[1]) == set()


def test_position_counts_rows_of_the_global_batch():
    plan = schedule([(5,) * 9], choice=2, lanes=2, lane_items=2)
    assert plan.batch_rows == 8
    assert plan.after(Position(0, 0)) == Position(0, 8)
    assert plan.after(Position(0, 8)) == Position(1, 0)


def test_random_captions_follow_from_epoch_and_key_alone():
    plan = schedule([(5,) * 9])
    picks = {(key, epoch): plan.pick(key, 5, epoch, 0) for key in "abcdefgh" for epoch in range(5)}
    assert picks == {at: plan.pick(at[0], 5, at[1], 0) for at in picks}
    assert len({tuple(pick) for pick in picks.values()}) == 5
