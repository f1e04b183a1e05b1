"""The order of the data is a function of seed, epoch and manifest, and loses nothing."""

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.contracts import Position
from mmscale.data.lanes import Lane, Tape, turns_of
from mmscale.data.stream import Schedule


def schedule(captions, choice="random", lanes=2, lane_items=2, buffer=4, seed=0):
    return Schedule(captions, choice, seed, lanes, lane_items, buffer)


def global_batches(plan: Schedule, epoch: int, world: int = 1, workers: int = 1):
    """Every batch as (shard, sample, turn) rows, put together from ranks and workers."""
    per_rank = plan.lanes // world
    lanes = plan.epoch(epoch)
    streams = {}
    for rank in range(world):
        for worker in range(max(1, workers)):
            for turn in range(per_rank):
                if turn % max(1, workers) == worker:
                    index = rank * per_rank + turn
                    streams[index] = lanes[index].items()
    return [
        [item for index in range(plan.lanes) for item in islice(streams[index], plan.lane_items)]
        for _ in range(plan.steps)
    ]


shard_sizes = st.lists(st.integers(0, 23), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    sizes=shard_sizes,
    lanes=st.integers(1, 6),
    lane_items=st.integers(1, 4),
    buffer=st.integers(1, 40),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_each_sample_once_and_only_the_remainder_sits_out(
    sizes, lanes, lane_items, buffer, seed, epoch
):
    plan = schedule([(5,) * n for n in sizes], "random", lanes, lane_items, buffer, seed)
    rows = [item for batch in global_batches(plan, epoch) for item in batch]
    assert len(rows) == len(set(rows)) == plan.steps * lanes * lane_items
    assert sum(sizes) - len(rows) < lanes * lane_items
    assert all(item.sample < sizes[item.shard] for item in rows)


@settings(max_examples=60, deadline=None)
@given(
    sizes=shard_sizes,
    lane_items=st.integers(1, 3),
    start=st.integers(0, 8),
    seed=st.integers(0, 5),
)
def test_a_lane_goes_on_at_any_place(sizes, lane_items, start, seed):
    plan = schedule([(5,) * n for n in sizes], "random", 4, lane_items, 7, seed)
    for lane in plan.epoch(1):
        whole = list(lane.items())
        assert list(lane.items(start)) == whole[start:]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=5),
    epoch=st.integers(0, 2),
)
def test_flat_gives_every_caption_once(counts, epoch):
    plan = schedule([tuple(c) for c in counts], "flat", 1, 1, 5)
    picked = []
    for item in (item for batch in global_batches(plan, epoch) for item in batch):
        key = f"{item.shard}-{item.sample}"
        captions = counts[item.shard][item.sample]
        picked += [(key, choice) for choice in plan.pick(key, captions, epoch, item.turn)]
    assert len(picked) == len(set(picked)) == sum(map(sum, counts))


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
    tape = Tape(turns_of([(1,) * 10], flat=False), 0, 0)
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
