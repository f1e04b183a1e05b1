"""Batches built on purpose: whoever moves, every row still comes once, inside its window."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.config.values import Ramp
from mmscale.data.arrange import (
    NEIGHBOURS,
    Arrangement,
    Neighbours,
    mean_by_image,
    nearest,
    read_neighbours,
)
from mmscale.data.lanes import Item
from mmscale.data.schedule import Schedule
from mmscale.errors import DataError


def plan(samples, lanes, lane_items, seed=0, **wishes):
    """A schedule over shards of these sizes, arranged as wished."""
    captions = [(5,) * count for count in samples]
    arrangement = Arrangement(samples=tuple(samples), **wishes) if wishes else None
    return Schedule(captions, "random", seed, lanes, lane_items, 40, arrangement=arrangement)


def global_batches(schedule, epoch=0, world=1, workers=1, step=0):
    """Every batch as the ranks' and workers' parts laid end to end."""
    per_rank = schedule.lanes // world
    streams = {}
    for rank in range(world):
        for worker in range(workers):
            first = rank * per_rank
            mine = range(first + worker, first + per_rank, workers)
            for lane, (_, items) in zip(mine, schedule.streams(epoch, mine, step), strict=True):
                streams[lane] = items
    return [
        [
            item
            for lane in range(schedule.lanes)
            for item in islice(streams[lane], schedule.lane_items)
        ]
        for _ in range(step, schedule.steps)
    ]


def places(schedule, batches):
    starts = np.cumsum([0, *map(len, schedule.captions)])
    return [[int(starts[item.shard]) + item.sample for item in batch] for batch in batches]


def table(count, seed=0, width=3, near=8):
    """Neighbours by the distance of random points, computed the plain way."""
    points = np.random.default_rng(seed).normal(size=(count, width))
    distance = ((points[:, None] - points[None]) ** 2).sum(-1) + np.diag([np.inf] * count)
    return np.argsort(distance, axis=1)[:, :near].astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    lanes=st.integers(1, 4),
    lane_items=st.integers(1, 4),
    width=st.integers(1, 9),
    positive=st.sampled_from([None, 0.0, 0.3, 1.0]),
    hard=st.sampled_from([None, 0.0, 0.4, 0.75, 1.0]),
    sizes=st.integers(1, 6),
    epoch=st.integers(0, 2),
)
def test_rows_change_places_inside_whole_windows_only(
    samples, lanes, lane_items, width, positive, hard, sizes, epoch
):
    count = sum(samples)
    wishes = {
        "width": width,
        "groups": [place // sizes for place in range(count)],
        "positive_share": positive,
        "neighbours": None if hard is None else table(count),
        "hard_share": hard or 0.0,
    }
    plain = global_batches(plan(samples, lanes, lane_items), epoch)
    schedule = plan(samples, lanes, lane_items, **wishes)
    built = global_batches(schedule, epoch)
    assert len(built) == len(plain)
    windows = schedule.arrangement.windows(schedule.steps)
    assert [step for window in windows for step in window] == list(range(schedule.steps))
    assert all(len(window) >= min(width, schedule.steps) for window in windows)
    for window in windows:
        before, after = (
            Counter(item for batch in batches[window.start : window.stop] for item in batch)
            for batches in (plain, built)
        )
        assert before == after
        # Lane by lane the batches are what the window was made into, seat by seat.
        part = slice(window.start, window.stop)
        assert not plain or built[part] == schedule.arrangement.arrange(plain[part])


@pytest.mark.parametrize(("positive", "hard"), [(0.0, None), (0.5, 0.25), (None, 0.5)])
def test_built_batches_are_one_ordered_list_at_every_world_and_worker_count(positive, hard):
    samples = (70, 3, 55)
    wishes = {
        "width": 3,
        "groups": [place % 60 for place in range(128)],
        "positive_share": positive,
        "neighbours": None if hard is None else table(128),
        "hard_share": hard or 0.0,
    }
    schedule = plan(samples, 4, 2, **wishes)
    reference = global_batches(schedule, epoch=1)
    assert reference != global_batches(plan(samples, 4, 2), epoch=1)
    assert reference != global_batches(schedule, epoch=2)
    for world in (1, 2, 4):
        for workers in (1, 2, 3):
            assert global_batches(schedule, 1, world, workers) == reference
    for step in range(schedule.steps):
        assert global_batches(schedule, 1, 2, 2, step) == reference[step:]


def test_without_wishes_lanes_are_as_they_were():
    schedule = plan((30, 20), 2, 3)
    streams = schedule.streams(0, range(2), 1)
    for (_, items), lane in zip(streams, schedule.epoch(0), strict=True):
        assert list(items) == list(lane.items(3))


def crowded(batches, groups):
    """Share of rows that sit beside another of their group."""
    rows = [
        count
        for batch in batches
        for count in Counter(groups[place] for place in batch).values()
        for _ in range(count)
    ]
    return sum(count > 1 for count in rows) / len(rows)


def test_groups_are_kept_apart():
    groups = [place % 90 for place in range(400)]
    loose = plan((400,), 4, 8)
    assert crowded(places(loose, global_batches(loose)), groups) > 0.2
    schedule = plan((400,), 4, 8, width=5, groups=groups, positive_share=0.0)
    assert crowded(places(schedule, global_batches(schedule)), groups) == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_positives_come_in_the_share_asked_for(share):
    groups = [place // 4 for place in range(480)]
    schedule = plan((480,), 4, 8, width=15, groups=groups, positive_share=share)
    assert crowded(places(schedule, global_batches(schedule)), groups) == pytest.approx(
        share, abs=0.05
    )


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("positive", [None, 0.0])
def test_neighbours_come_in_the_share_asked_for_and_no_positives_for_them(share, positive):
    near, groups = table(600), [place // 2 for place in range(600)]
    wishes = {"width": 20, "groups": groups, "positive_share": positive}
    schedule = plan((600,), 6, 5, **wishes, neighbours=near, hard_share=share)
    batches = places(schedule, global_batches(schedule))
    close = [set(row.tolist()) for row in near]

    def beside_a_neighbour(batches):
        rows = [(place, set(batch)) for batch in batches for place in batch]
        return sum(bool(close[place] & others) for place, others in rows) / len(rows)

    plain = plan((600,), 6, 5)
    by_chance = beside_a_neighbour(places(plain, global_batches(plain)))
    # Every guest has a host, so at least twice as many rows sit beside a neighbour.
    assert beside_a_neighbour(batches) > 0.9 * min(1, by_chance + share)
    assert beside_a_neighbour(batches) > by_chance + share / 2
    if positive == 0.0:
        assert crowded(batches, groups) == 0


def test_a_ramp_of_hard_batches_goes_on_over_the_epochs():
    wishes = {"width": 4, "groups": list(range(240)), "neighbours": table(240)}
    ramp = Ramp.parse({"from": 0, "to": 0.5, "over": "1 epochs", "start": "1 epochs"})
    course = replace(plan((240,), 4, 5, **wishes), hard_share=ramp)
    assert course.steps == 12
    plain, half = (plan((240,), 4, 5, **wishes, hard_share=share) for share in (0.0, 0.5))
    assert global_batches(course, 0) == global_batches(plain, 0)
    assert global_batches(course, 2) == global_batches(half, 2)
    rising = global_batches(course, 1)
    # The windows of the second epoch have shares 0, 1/6 and 1/3.
    for window, share in zip(course.arrangement.windows(12), (0, 1 / 6, 1 / 3), strict=True):
        part = slice(window.start, window.stop)
        steady = plan((240,), 4, 5, **wishes, hard_share=share)
        assert rising[part] == global_batches(steady, 1)[part]
    assert global_batches(course, 1, 2, 2, 6) == rising[6:]


def test_neighbours_of_one_group_are_not_brought_together():
    pairs = np.array([[place ^ 1] for place in range(64)], np.int32)
    groups = [place // 2 for place in range(64)]
    wishes = {"width": 8, "groups": groups, "neighbours": pairs, "hard_share": 0.5}
    plain = plan((64,), 1, 8)
    assert global_batches(plan((64,), 1, 8, **wishes)) == global_batches(plain)
    other = {**wishes, "groups": list(range(64))}
    schedule = plan((64,), 1, 8, **other)
    assert crowded(places(schedule, global_batches(schedule)), groups) == 1


def test_a_turn_of_flat_captions_is_an_item_like_any():
    captions = [(3,) * 30]
    arrangement = Arrangement(5, (30,), list(range(30)), 0.0)
    schedule = Schedule(captions, "flat", 0, 2, 5, 10, arrangement=arrangement)
    batches = global_batches(schedule)
    items = [item for batch in batches for item in batch]
    assert len(set(items)) == len(items) == 90
    assert {item.turn for item in items} == {0, 1, 2}
    assert all(len({item.sample for item in batch}) == len(batch) for batch in batches)
    assert isinstance(items[0], Item)


def test_nearest_is_the_plain_computation():
    features = torch.randn(50, 6)
    ids = torch.arange(50) // 2 + 7
    found = nearest(features, ids, count=10)
    unit = features / features.norm(dim=1, keepdim=True)
    for row in range(50):
        others = [other for other in range(50) if ids[other] != ids[row]]
        ranked = sorted(others, key=lambda other: -float(unit[row] @ unit[other]))
        assert found.rows[row].tolist() == ranked[:10]
    assert nearest(features[:3], ids[:3], count=9).rows.shape == (3, 2)


def test_a_table_is_found_by_image_id():
    given_ids = np.array([30, 10, 20, 99])
    rows = np.array([[1, 2, 3], [0, -1, 2], [3, 1, 0], [0, 1, 2]], np.int32)
    samples = np.array([20, 55, 10, 30])
    found = Neighbours(given_ids, rows).places(samples)
    # Images of the table that the samples lack, and samples that the table lacks, give none.
    assert found.tolist() == [[-1, 2, 3], [-1, -1, -1], [3, -1, 0], [2, 0, -1]]


def test_captions_of_an_image_count_together():
    text = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [9.0, 9.0]])
    mean = mean_by_image(text, torch.tensor([5, 5, 4, 8]), torch.tensor([4, 5, 4]))
    assert mean.tolist() == [[1, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize("by", ["image", "text"])
def test_embeddings_that_were_written_are_a_table(tmp_path, by):
    ids, image, text = torch.arange(40) + 3, torch.randn(40, 5), torch.randn(80, 5)
    text_ids = ids.repeat(2)
    arrays = {"image_ids": ids, "image": image, "text": text, "text_ids": text_ids}
    np.savez(tmp_path / "e.npz", **{name: value.numpy() for name, value in arrays.items()})
    features = image if by == "image" else mean_by_image(text, text_ids, ids)
    found = read_neighbours(tmp_path / "e.npz", by)
    assert found.rows.tolist() == nearest(features, ids, NEIGHBOURS).rows.tolist()
    # And its result is one, in both kinds of file.
    from safetensors.torch import save_file

    save_file(found.tensors(), tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", **{k: v.numpy() for k, v in found.tensors().items()})
    for name in ("t.safetensors", "t.npz"):
        again = read_neighbours(tmp_path / name, by)
        assert (again.rows == found.rows).all()
        assert (again.image_ids == found.image_ids).all()


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": np.zeros((4, 2), np.float32)},
        {"image_ids": np.arange(4), "image": np.zeros((3, 2), np.float32)},
        {"image_ids": np.arange(4), "image": np.full((4, 2), np.nan, np.float32)},
        {"image_ids": np.arange(4), "neighbours": np.array([[0], [1], [2], [4]])},
        {"image_ids": np.arange(4), "neighbours": np.array([[0], [1], [2]])},
        {"image_ids": np.arange(4.0), "neighbours": np.array([[0], [1], [2], [3]])},
        {"image_ids": np.array([{}] * 4), "neighbours": np.array([[0], [1], [2], [3]])},
    ],
)
def test_what_is_no_table_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(DataError, match=r"t\.npz"):
        read_neighbours(tmp_path / "t.npz", "image")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    for name in ("t.npz", "t.safetensors"):
        (tmp_path / name).write_bytes(b"no table at all")
        with pytest.raises(DataError, match="cannot be read"):
            read_neighbours(tmp_path / name, "image")
    with pytest.raises(DataError, match="cannot be read"):
        read_neighbours(tmp_path / "missing.npz", "image")
