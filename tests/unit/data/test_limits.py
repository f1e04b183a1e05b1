"""What a server or a shard may take of memory, disk and time: refused while it is read."""

import os
import socketserver
import tarfile
import tempfile
import threading
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmscale.data import forward, impatient, remote, shard_bytes
from mmscale.data import manifest as manifests
from mmscale.data.damage import DamagedSampleError
from mmscale.data.far import Far, keep
from mmscale.data.forward import read_through
from mmscale.data.index import index
from mmscale.data.lanes import Item
from mmscale.data.manifest import Shard, read_manifest
from mmscale.data.reader import SampleReader
from mmscale.data.shard_bytes import _Ranges
from mmscale.data.shards import ShardSet, open_shards
from mmscale.errors import DataError
from tests.unit.data.tars import add, write_shards
from tests.unit.data.web_server import serving

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BLOCK = bytes(2**16)


class Hostile(socketserver.ThreadingTCPServer):
    """Answers every request by `answer(send)`; counts what it sent."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Request)
        self.answer, self.sent, self.requests = answer, 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client may leave whenever it likes."""


class _Request(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(2**16)
        self.server.requests += 1

        def send(content):
            self.request.sendall(content)
            self.server.sent += len(content)

        self.server.answer(send)


@contextmanager
def hostile(answer):
    with Hostile(answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def chunk(content):
    return b"%x\r\n%s\r\n" % (len(content), content)


def endless(send):
    send(CHUNKED)
    for _ in range(2**14):
        send(chunk(BLOCK))


def trickle(send, opening=OK + b"Content-Length: 100000\r\n\r\n", content=b" "):
    send(opening)
    for _ in range(2000):
        send(content)
        time.sleep(0.02)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(impatient, "SECONDS", 0.3)


def test_an_endless_manifest_is_refused_while_it_arrives(monkeypatch):
    monkeypatch.setattr(manifests, "MOST_BYTES", 2**21)
    with hostile(endless) as server:
        with pytest.raises(DataError, match=r"more than 2,097,152 bytes, which no manifest has"):
            open_shards("data.train", f"{server.url}/train")
        # What is on its way in the sockets' buffers besides.
        assert server.sent < 2**21 + 2**25
    command = "pipe:cat /dev/zero # a.tar"
    with pytest.raises(DataError, match=r"more than 2,097,152 bytes"):
        open_shards("data.train", command, allow_pipe=True)


def test_a_huge_manifest_on_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MOST_BYTES", 2**20)
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="more than 1,048,576 bytes"):
        read_manifest(tmp_path)


HEADERS = {
    "body": {},
    "header": {"opening": OK, "content": b"X"},
    "chunk": {"opening": CHUNKED, "content": b"1\r\n \r\n"},
}


@pytest.mark.parametrize("part", HEADERS)
def test_a_trickle_ends_the_opening_of_a_manifest(hasty, part):
    with hostile(lambda send: trickle(send, **HEADERS[part])) as server:
        began = time.monotonic()
        with pytest.raises(DataError, match=r"only \d+ bytes in \d+ seconds, 2 times in a row"):
            open_shards("data.train", f"{server.url}/train")
        assert server.requests == 2
        assert time.monotonic() - began < 20


def test_a_trickle_in_a_shard_ends_the_run(hasty, tmp_path):
    folder = write_shards(tmp_path / "shards", [3], 60_000)
    record = read_manifest(folder).shards[0]
    opening = OK + b"Content-Length: %d\r\n\r\n" % record.bytes
    with hostile(lambda send: trickle(send, opening)) as server:
        shards = ShardSet((record,), (f"{server.url}/a.tar",), "", ((1, 1.0),))
        with pytest.raises(DataError, match=r"a\.tar: only .* bytes in"):
            SampleReader(shards).read(0, 0)


def test_a_byte_for_each_connection_is_no_progress(hasty):
    def one_byte(send):
        send(OK + b"Content-Length: 100000\r\n\r\n ")

    with hostile(one_byte) as server:
        with pytest.raises(DataError, match="6 times in a row"):
            list(Far().chunks(f"{server.url}/a.tar"))
        assert server.requests == 6


def test_a_slow_consumer_is_no_slow_server(hasty, tmp_path):
    """Only waiting for bytes counts, not the time between two reads."""
    write_shards(tmp_path, [4], 400_000, manifest=False)
    with serving(tmp_path) as server:
        chunks = Far().chunks(f"{server.url}/train-000000.tar")
        for _ in range(3):
            next(chunks)
            time.sleep(0.35)
        assert sum(map(len, chunks)) > 0


def test_numbers_of_thousands_of_digits_are_no_size():
    body = b"x" * 600
    many = b"9" * 5000
    answer = (
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-599/%s\r\n"
        b"Content-Length: 600\r\n\r\n%s" % (many, body)
    )
    with hostile(lambda send: send(answer)) as server:
        assert b"".join(Far().chunks(f"{server.url}/a.tar", 0, 600)) == body
        assert Far().opening(f"{server.url}/a.tar") == (body[:512], None)


@pytest.mark.parametrize("kind", ["server", "command"])
def test_a_shard_that_is_copied_takes_no_more_room_than_its_manifest_says(
    tmp_path, monkeypatch, kind
):
    kept = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copied = shard_bytes.keep

    def measured(chunks, file, size):
        written = copied(chunks, file, size)
        kept.append(os.fstat(file.fileno()).st_size)
        return written

    monkeypatch.setattr(shard_bytes, "keep", measured)
    record = Shard("a.tar", 10240, "0" * 64, 1, (0,), (1,))
    with hostile(endless) as server:
        where = f"{server.url}/a.tar" if kind == "server" else "pipe:cat /dev/zero"
        source = _Ranges([record], [where])
        source._far._web._whole_only.add(server.url.removeprefix("http://"))
        with pytest.raises(DataError, match=r"more than 10240 bytes, its manifest says 10240"):
            source.read(0, 0, 10240)
    assert kept[0] <= 10240


def test_a_full_disk_is_a_sentence():
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(DataError, match=r"No space left on device.*TMPDIR"),
    ):
        keep(iter([b"a"]), full, 10)


HOLE = 2**28


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Samples of which one has a member of 256 MiB that nobody asked for: first, between, last."""
    folder = tmp_path_factory.mktemp("big")
    for place in range(3):
        with (folder / f"{place}.tar").open("wb") as file:
            for number in range(6):
                key = f"{place}{number}"
                parts = [(f"{key}.jpg", b"x" * 900), (f"{key}.txt", f"caption {key}".encode())]
                if number == 3:
                    parts.insert(place, (f"{key}.bin", HOLE))
                for name, content in parts:
                    info = tarfile.TarInfo(name)
                    info.size = content if isinstance(content, int) else len(content)
                    file.write(info.tobuf(tarfile.GNU_FORMAT))
                    if isinstance(content, int):
                        file.seek(content, os.SEEK_CUR)
                    else:
                        file.write(content + bytes(-len(content) % 512))
            file.write(bytes(10240))
    index(sorted(folder.glob("*.tar")))
    return folder


@pytest.mark.parametrize("kind", ["file", "server"])
def test_a_member_that_nobody_asked_for_stays_where_it_is(big, kind):
    def check(where):
        reader = SampleReader(open_shards("x", where), 64)
        tracemalloc.start()
        for shard in range(3):
            items = [Item(shard, number, 0) for number in range(6)]
            for number, item in enumerate(reader.ahead(iter(items))):
                assert reader.take(item).captions == (f"caption {shard}{number}",)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        reader.close()
        assert peak < HOLE / 4

    if kind == "file":
        check(str(big))
        return
    with serving(big) as server:
        check(server.url)
        assert server.sent() < HOLE / 4


def test_bytes_without_a_sample_end_a_shard_that_is_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "_PASSED_OVER_BYTES", 2**20)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"x")
        add(tar, "a.txt", b"a dog")
        add(tar, "b.jpg", b"x")
        for number in range(3):
            add(tar, f"b{number}.bin", bytes(2**19))
        add(tar, "c.jpg", b"x")
    sample, fault = read_through(tmp_path / "a.tar", Far())
    assert sample.captions == ("a dog",)
    assert "bytes without a sample" in fault


def test_captions_are_as_many_as_the_manifest_says(tmp_path):
    """More or fewer would end a feature pass, or make it endless."""
    folder = write_shards(tmp_path / "shards", [3], 600)
    shards = open_shards("x", str(folder))
    record = shards.shards[0]
    lying = Shard(record.name, record.bytes, record.sha256, 3, record.offsets, (1, 2, 1))
    reader = SampleReader(ShardSet((lying,), shards.paths, "", ((1, 1.0),)))
    assert reader.read(0, 0).captions == ("caption of 000000",)
    with pytest.raises(DamagedSampleError, match="captions: 1, its manifest says 2"):
        reader.read(0, 1)
