"""Shards without a manifest: drawn with replacement, in an order that follows from the position."""

import collections
import dataclasses
import gzip
import io
import math
import os
import random
import tarfile
from itertools import islice

import pytest

from mmscale.config.load import load_config
from mmscale.contracts import Position
from mmscale.data import forward, remote
from mmscale.data.damage import DamagedSampleError
from mmscale.data.far import Far
from mmscale.data.forward import read_from, read_through
from mmscale.data.reader import SampleReader
from mmscale.data.resampled import Resampling, plan_resampling
from mmscale.data.schedule import Schedule
from mmscale.data.shards import ShardSet, list_shards
from mmscale.errors import DataError
from tests.unit.data.tars import write_shards
from tests.unit.data.web_server import serving

SIZES = [7, 3, 12, 5]
LANES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resampled") / "shards"
    return write_shards(folder, SIZES, 5_000, manifest=False)


def schedule(paths, weights=None, samples=60, buffer=6, seed=0):
    resampling = Resampling(tuple(paths), tuple(weights or [1.0] * len(paths)), samples)
    return Schedule([], "random", seed, LANES, 3, buffer, (), resampling)


def batches(plan, epoch=0, start=0, count=None):
    """Whole batches of keys from batch `start` on."""
    streams = [lane.items(start * plan.lane_items) for lane in plan.epoch(epoch)]
    return [
        [item.content.key for stream in streams for item in islice(stream, plan.lane_items)]
        for _ in range(start, plan.steps if count is None else start + count)
    ]


def tars(folder):
    return sorted(folder.glob("*.tar"))


def test_an_epoch_has_the_length_that_was_asked_for(folder):
    plan = schedule(tars(folder))
    assert (plan.items, plan.steps) == (60, 5)
    assert plan.after(Position(2, 48)) == Position(3, 0)
    assert [len(batch) for batch in batches(plan)] == [12] * 5


def test_going_on_gives_the_tail(folder):
    plan = schedule(tars(folder))
    whole = batches(plan, epoch=3)
    for start in range(5):
        assert batches(plan, 3, start) == whole[start:]


def test_a_lane_reads_its_own_shards_whoever_reads_the_others(folder):
    """The items of a lane are the same when no other lane is read at all."""
    plan = schedule(tars(folder))
    whole = [[item.content.key for item in lane.items()] for lane in plan.epoch(1)]
    for lane in (3, 1):
        assert [item.content.key for item in plan.epoch(1)[lane].items()] == whole[lane]


def test_epochs_lanes_and_seeds_draw_differently(folder):
    orders = {
        tuple(item.content.key for item in lane.items())
        for seed in (0, 1)
        for epoch in (0, 1)
        for lane in schedule(tars(folder), seed=seed).epoch(epoch)
    }
    assert len(orders) == 16


def test_shards_are_drawn_as_often_as_their_weights_say(tmp_path):
    paths = tars(write_shards(tmp_path, [1, 1, 1, 1], 100, manifest=False))
    plan = schedule(paths, [0.5, 0.5, 1.0, 0.0], samples=3_000)
    drawn = collections.Counter(item.shard for lane in plan.epoch(0) for item in lane.items())
    shares = [drawn[shard] / drawn.total() for shard in range(4)]
    assert shares == pytest.approx([0.25, 0.25, 0.5, 0], abs=0.03)


UNEVEN = [40, 6, 25, 1]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven") / "shards"
    return tars(write_shards(folder, UNEVEN, 20_000, manifest=False))


def counted(resampling, lanes, buffer, epochs):
    """How often each key came in some epochs."""
    length = resampling.epoch_samples // lanes
    return collections.Counter(
        item.content.key
        for epoch in range(epochs)
        for lane in resampling.lanes(lanes, length, buffer, 0, epoch)
        for item in lane.items()
    )


def planned(paths, samples, weights=None):
    """As `plan_resampling` puts it together, so with the files' sizes."""
    sources = tuple((1, weight) for weight in weights or [1.0] * len(paths))
    shards = ShardSet((), tuple(paths), "", sources)
    data = load_config(["demo", "data.train=x", f"data.epoch_samples={samples}",
                        "data.resampled=true"]).data  # fmt: skip
    return plan_resampling(data, shards)


@pytest.mark.parametrize(("lanes", "samples", "buffer"), [(1, 30, 8), (8, 72, 1), (4, 16, 8)])
def test_every_sample_has_the_same_chance(uneven, lanes, samples, buffer):
    """Also where a lane's part of an epoch is far shorter than a shard."""
    epochs = 25 * sum(UNEVEN) // samples
    seen = counted(planned(uneven, samples), lanes, buffer, epochs)
    assert len(seen) == sum(UNEVEN)
    mean = seen.total() / sum(UNEVEN)
    # 25 times each: five deviations of a Poisson count, and somewhat less for a whole shard.
    assert all(abs(number - mean) < 5 * mean**0.5 for number in seen.values())
    for shard, size in enumerate(UNEVEN):
        of_shard = sum(n for key, n in seen.items() if key.startswith(f"{shard:02d}"))
        assert abs(of_shard / size - mean) < 3.5 * mean**0.5


def test_weights_are_chances_of_a_sample_whatever_its_shard_holds(uneven):
    seen = counted(planned(uneven[:2], 46, [1.0, 3.0]), 4, 4, 50)
    shares = [
        sum(n for key, n in seen.items() if key.startswith(f"0{shard}")) / UNEVEN[shard]
        for shard in (0, 1)
    ]
    assert shares[1] / shares[0] == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize(("lanes", "samples"), [(1, 72), (16, 64), (4, 16)])
def test_everything_is_seen_within_the_expected_number_of_epochs(uneven, lanes, samples):
    """What draws with replacement need: the logarithm of their number, and a little for luck."""
    total = sum(UNEVEN)
    laps = math.log(total) + 4
    assert len(counted(planned(uneven, samples), lanes, 8, math.ceil(laps * total / samples))) == (
        total
    )


def test_the_first_batch_is_drawn_from_full_pools(tmp_path):
    """As many distinct images as draws with replacement give, also with fewer shards than lanes."""
    paths = tars(write_shards(tmp_path, [200, 200], 100, manifest=False))
    lanes = planned(paths, 400).lanes(64, 6, 128, 0, 0)
    first = {next(lane.items()).content.key for lane in lanes}
    expected = 400 * (1 - (1 - 1 / 400) ** 64)
    assert len(first) > expected - 10


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("folder", ["", "folder/" * 18, "\u56fe\u7247/"])
@pytest.mark.parametrize("look_back", [0, 2**20])
def test_a_tar_is_entered_at_any_place(tmp_path, monkeypatch, name, folder, look_back):
    """Only whole samples follow: those behind the place, under their whole names."""
    monkeypatch.setattr(forward, "_LOOK_BACK", look_back)
    path = tmp_path / "a.tar"
    noise = random.Random(0)
    with tarfile.open(path, "w", format=FORMATS[name]) as tar:
        for number in range(8):
            # Python's own pax headers come with times that are no whole seconds.
            for ending, size in (("jpg", 3000 + 700 * number), ("json", 0), ("txt", 10)):
                info = tarfile.TarInfo(f"{folder}{number:03d}.{ending}")
                content = noise.randbytes(size) if size > 10 else b"{}" if not size else b"a" * 10
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))
    wanted = everything(path)
    assert len(wanted) == 8
    begins = collections.Counter()
    for place in range(200):
        got = list(read_from(path, Far(), place / 200, {}))
        assert got == wanted[len(wanted) - len(got) :]
        begins[len(got)] += 1
    if look_back:
        # In proportion to the size of the sample before it; none is left behind the last.
        assert set(begins) == set(range(8))
        assert begins[7] < begins[0]


def test_a_sample_drawn_again_takes_another_turn(folder):
    """Turns choose captions and crops: no two draws of an epoch share one."""
    plan = schedule(tars(folder), samples=600)
    rows = [
        (item.content.key, item.turn, item.lap) for lane in plan.epoch(0) for item in lane.items()
    ]
    assert len(set(rows)) == len(rows) == 600


def test_the_buffer_shuffles_and_loses_nothing(folder):
    plan = schedule(tars(folder)[2:3], samples=48, buffer=5)
    for lane in plan.epoch(0):
        keys = [item.content.key for item in lane.items()]
        assert keys != sorted(keys)
        # One shard again and again: by the end of the first pass no sample came more than twice.
        assert max(collections.Counter(keys).values()) <= 2


def test_epoch_length_comes_from_the_first_shard_unless_told(folder, synthetic_data_config):
    shards = list_shards("data.train", str(folder))
    data = synthetic_data_config
    assert plan_resampling(data, shards).epoch_samples == SIZES[0] * len(SIZES)
    told = data.model_copy(update={"epoch_samples": 1000})
    assert plan_resampling(told, shards).epoch_samples == 1000
    weighted = dataclasses.replace(shards, sources=((1, 2.0), (3, 0.5)))
    assert plan_resampling(told, weighted).weights == (2.0, 0.5, 0.5, 0.5)


@pytest.fixture
def synthetic_data_config():
    return load_config(["demo", "data.train=x", "data.resampled=true"]).data


def everything(where):
    return list(read_through(where, Far()))


def test_what_has_only_a_beginning_is_counted_once(folder, tmp_path):
    """Commands and compressed tars: a place in them is a number of samples."""
    path = tars(folder)[2]
    packed = tmp_path / "a.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    wanted, counts = everything(path), {}
    for where in (f"pipe:cat '{path}'", packed):
        for place in range(12):
            part = (place + 0.5) / 12
            assert list(read_from(where, Far(), part, counts)) == wanted[place:]
    assert list(counts.values()) == [12, 12]


@pytest.mark.parametrize("ranges", [True, False])
def test_servers_shards_are_entered_like_files(folder, monkeypatch, ranges):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    with serving(folder) as server:
        server.ranges = ranges
        urls = [f"{server.url}/{path.name}" for path in tars(folder)]
        assert planned(urls, 60).sizes == planned(tars(folder), 60).sizes
        for part in (0.0, 0.3, 0.6, 0.99):
            of_file = list(read_from(tars(folder)[2], Far(), part, {}))
            assert list(read_from(urls[2], Far(), part, {})) == of_file


@pytest.mark.parametrize("ranges", [True, False])
def test_web_commands_and_compressed_files_hold_the_same(folder, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    path = tars(folder)[2]
    wanted = everything(path)
    assert [sample.key for sample in wanted] == [f"02{number:04d}" for number in range(12)]
    assert everything(f"pipe:cat '{path}'") == wanted
    packed = tmp_path / "a.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert everything(packed) == wanted
    with serving(folder) as server:
        server.ranges, server.drops = ranges, 2
        assert everything(f"{server.url}/{path.name}") == wanted
        assert server.drops == 0


def _cut(content):
    return content[: len(content) * 2 // 3]


def _cut_at_a_header(content):
    return content[: content.rindex(b"020009.jpg")]


def _damaged_header(content):
    place = content.rindex(b"020009.jpg")
    return content[:place] + b"X" + content[place + 1 :]


@pytest.mark.parametrize("damage", [_cut, _cut_at_a_header, _damaged_header])
def test_a_damaged_shard_gives_what_is_whole_and_one_line(folder, tmp_path, damage):
    path = tmp_path / "a.tar"
    path.write_bytes(damage(tars(folder)[2].read_bytes()))
    *samples, fault = everything(path)
    wanted = everything(tars(folder)[2])
    assert samples == wanted[: len(samples)]
    assert len(samples) >= 7
    assert fault.startswith("a.tar: is not a whole tar")


@pytest.mark.parametrize("content", [b"", b"<html>not a tar</html>" * 100])
def test_a_file_that_is_no_tar_is_one_line(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    (fault,) = everything(path)
    assert "is not a whole tar" in fault


def test_damage_keeps_its_place_and_others_stand_in(folder, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(_cut(tars(folder)[2].read_bytes()))
    plan = schedule([path, tars(folder)[0]])
    reader = SampleReader(list_shards("data.train", str(folder)))
    damaged = 0
    for lane, untouched in zip(plan.epoch(0), plan.epoch(0), strict=True):
        for place, (item, same) in enumerate(zip(lane.items(), untouched.items(), strict=True)):
            # Looking for a stand-in does not move what comes after.
            assert item == same
            if isinstance(item.content, str):
                damaged += 1
                with pytest.raises(DamagedSampleError, match=r"a\.tar: is not a whole tar"):
                    reader.take(item)
                stand_in = next(i for i in lane.around(place) if not isinstance(i.content, str))
                assert reader.take(stand_in) == stand_in.content
    assert damaged


def test_what_stands_in_is_the_nearest_earlier_also_after_going_on(folder):
    plan = schedule(tars(folder))
    keys = [item.content.key for item in plan.epoch(0)[0].items()]
    for start in (0, 6):
        lane = plan.epoch(0)[0]
        share = list(islice(lane.items(start), 3))
        around = [item.content.key for item in lane.around(start + 1)]
        assert share[1].content.key == keys[start + 1]
        assert around[: start + 1] == keys[: start + 1][::-1]
        assert around[start + 1] == keys[start + 2]
        assert around[start + 2 : start + 4] == keys[start + 3 : start + 5]
        assert [item.content.key for item in lane.items()] == keys[start + 3 :]


def test_a_shard_that_is_gone_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read \(No such file"):
        batches(schedule([tmp_path / "gone.tar"]))
    with pytest.raises(DataError, match=r"ended with 3"):
        batches(schedule(["pipe:exit 3"]))


def test_shards_without_samples_end_in_a_sentence(tmp_path):
    empty = tmp_path / "empty.tar"
    empty.write_bytes(bytes(10240))
    with pytest.raises(DataError, match=r"empty\.tar: holds no sample"):
        batches(schedule([empty]))


def test_reading_stops_with_the_reader(folder, tmp_path):
    """A command whose output nobody wants any more is ended, children and all."""
    marker = tmp_path / "pid"
    where = f"pipe:echo $$ > {marker}; cat '{tars(folder)[2]}'; sleep 60 | cat"
    samples = read_through(where, Far())
    next(samples)
    samples.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
