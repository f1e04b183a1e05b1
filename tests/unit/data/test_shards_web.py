"""Shards behind a web server, over real connections that really drop."""

import random

import pytest

from mmscale.data import remote
from mmscale.data.lanes import Item
from mmscale.data.reader import SampleReader
from mmscale.data.schedule import Schedule
from mmscale.data.shards import open_shards
from mmscale.errors import DataError
from tests.unit.data.tars import write_shards
from tests.unit.data.web_server import serving

SIZES = [60, 40, 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of several blocks each."""
    return write_shards(tmp_path_factory.mktemp("web") / "shards", SIZES, 100_000)


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    with serving(folder) as running:
        yield running


def all_samples(reader):
    return [
        reader.read(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)
    ]


@pytest.fixture(scope="module")
def samples(folder):
    return all_samples(SampleReader(open_shards("data.train", str(folder))))


@pytest.mark.parametrize("pattern", ["", "/", "/train-{000000..000002}.tar"])
def test_the_same_samples_as_from_files(server, samples, pattern):
    reader = SampleReader(open_shards("data.train", server.url + pattern))
    assert all_samples(reader) == samples
    reader.close()


def test_a_list_of_urls(server, folder):
    urls = [f"{server.url}/train-000002.tar", f"{server.url}/train-000000.tar"]
    shards = open_shards("data.train", urls)
    local = open_shards(
        "data.train", [str(folder / "train-000002.tar"), str(folder / "train-000000.tar")]
    )
    assert (shards.shards, shards.digest) == (local.shards, local.digest)
    assert [path for path, _, _ in server.requests] == ["/manifest.json"]


def test_every_byte_of_a_shuffled_epoch_is_fetched_about_once(server, folder):
    """And in blocks: far fewer requests than samples."""
    shards = open_shards("data.train", server.url)
    plan = Schedule([s.captions for s in shards.shards], "random", 0, 3, 2, 20, shards.sources)
    reader = SampleReader(shards, window=60)
    lanes = [reader.ahead(lane.items()) for lane in plan.epoch(0)]
    files = SampleReader(open_shards("data.train", str(folder)))
    for _ in range(plan.steps):
        for lane in lanes:
            for item in (next(lane), next(lane)):
                assert reader.take(item) == files.take(item)
    size = sum(shard.bytes for shard in shards.shards)
    assert size * 0.95 < server.sent() < size * 1.3
    assert len(server.requests) < sum(SIZES) / 4
    reader.close()


def test_memory_is_bounded_when_samples_are_never_taken(server):
    """A reader that takes one sample of each block lets go of the rest."""
    shards = open_shards("data.train", server.url)
    reader = SampleReader(shards)
    reader._remote._room = 2**20
    for _ in range(3):
        for shard, size in enumerate(SIZES):
            for sample in range(0, size, 30):
                reader.read(shard, sample)
                assert reader._remote._held_bytes <= 2**20
    assert reader._remote._held_bytes == sum(map(len, reader._remote._held.values()))
    reader.close()


@pytest.mark.parametrize("ranges", [True, False])
def test_dropped_connections_are_taken_up_again(server, samples, ranges):
    server.ranges = ranges
    shards = open_shards("data.train", server.url)
    server.drops = 4
    reader = SampleReader(shards)
    assert all_samples(reader) == samples
    assert server.drops == 0
    if ranges:
        # It goes on where it was: nothing comes twice.
        assert server.sent() <= sum(shard.bytes for shard in shards.shards)
    reader.close()


def test_a_server_without_ranges_sends_each_shard_about_once(server, samples):
    server.ranges = False
    shards = open_shards("data.train", server.url)
    reader = SampleReader(shards)
    order = [(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]
    wanted = dict(zip(order, samples, strict=True))
    random.Random(0).shuffle(order)
    for shard, sample in order:
        assert reader.read(shard, sample) == wanted[shard, sample]
    assert len([path for path, _, _ in server.requests if path.endswith(".tar")]) <= 2 * len(SIZES)
    reader.close()


def test_a_server_that_recovers_is_asked_again(server, samples):
    shards = open_shards("data.train", server.url)
    server.statuses = [503, 429, 500]
    reader = SampleReader(shards)
    assert all_samples(reader) == samples
    reader.close()


def _always_busy(server):
    server.statuses = [503] * 100


def _gone(server):
    server.statuses = [404] * 100


def _forbidden(server):
    server.statuses = [403] * 100


FAILURES = {
    _always_busy: f"503 Service Unavailable, {remote.ATTEMPTS} times in a row",
    _gone: "answers 404 Not Found",
    _forbidden: "answers 403 Forbidden",
}


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_server_that_fails_is_named_after_few_attempts(server, fail, ahead):
    """Also where a thread fetches ahead of the turn."""
    shards = open_shards("data.train", f"{server.url}/?signature=secret")
    server.requests.clear()
    fail(server)
    reader = SampleReader(shards)
    items = iter([Item(1, 0, 0)])
    with pytest.raises(
        DataError, match=f"{server.url}/train-000001.tar: .*{FAILURES[fail]}"
    ) as said:
        reader.take(next(reader.ahead(items) if ahead else items))
    assert "secret" not in str(said.value)
    assert len(server.requests) <= remote.ATTEMPTS
    reader.close()


def test_a_server_that_never_gets_further_is_named(server, samples):
    """Every connection drops at once, before a byte of the wanted part came."""
    shards = open_shards("data.train", server.url)
    server.ranges = False
    reader = SampleReader(shards)
    server.drops = 10**6
    with pytest.raises(DataError, match=f"train-000000.tar: .*{remote.ATTEMPTS} times in a row"):
        reader.read(0, SIZES[0] - 1)
    reader.close()


def test_nobody_listens(folder, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    with serving(folder) as server:
        url = server.url
        shards = open_shards("data.train", url)
    server.server_close()
    with pytest.raises(DataError, match=r".*refused, 6 times in a row"):
        open_shards("data.train", url)
    with pytest.raises(DataError, match=r"train-000000\.tar: .*refused, 6 times in a row"):
        SampleReader(shards).read(0, 0)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_than_its_manifest_says_is_named(
    folder, tmp_path, monkeypatch, ranges, change
):
    other = tmp_path / "shards"
    other.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "train-000001.tar":
            content = content[:change] if change < 0 else content + bytes(change)
        (other / path.name).write_bytes(content)
    with serving(other) as server:
        server.ranges = ranges
        shards = open_shards("data.train", server.url)
        reader = SampleReader(shards)
        reader.read(0, 0)
        size = shards.shards[1].bytes
        said = f"train-000001.tar: {size + change} bytes, its manifest says {size}"
        with pytest.raises(DataError, match=said):
            reader.read(1, 0)
        reader.close()


def test_no_manifest_beside_the_shards(tmp_path):
    write_shards(tmp_path, [2], 500, manifest=False)
    with serving(tmp_path) as server, pytest.raises(DataError, match=r"404.*mmscale index"):
        open_shards("data.train", f"{server.url}/train-000000.tar")
