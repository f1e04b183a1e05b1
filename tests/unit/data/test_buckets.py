"""Shards in buckets, over the protocol of S3 and real connections that really break."""

import json
import os
import threading
import time
from functools import reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmscale.data import remote
from mmscale.data.buckets import Buckets
from mmscale.data.far import Far
from mmscale.data.forward import read_from
from mmscale.data.index import index
from mmscale.data.named_tars import named_tars
from mmscale.data.reader import SampleReader
from mmscale.data.shards import list_shards, open_shards
from mmscale.data.verify import verify_all
from mmscale.errors import ConfigError, DataError
from tests.bucket_server import BUCKET, breaking, running_buckets
from tests.unit.data.tars import write_shards
from tests.unit.data.web_server import serving

SIZES = [30, 20, 25]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("buckets") / "shards", SIZES, 100_000)


@pytest.fixture(scope="module")
def server(folder):
    with running_buckets() as running:
        running.upload(folder, "deep/shards")
        yield running


@pytest.fixture
def _logged_in(server, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    _use(server.environment(), monkeypatch)


def _use(environment, monkeypatch):
    """A process of its own reads buckets: a new one sees the new environment."""
    from mmscale.data import buckets

    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    buckets._process.end()


def bare(server, folder, under):
    """The shards in the bucket without their manifest; the address of their folder."""
    where = server.upload(folder, under)
    server.client.delete_object(Bucket=BUCKET, Key=f"{under}/manifest.json")
    return where


def all_samples(reader):
    return [
        reader.read(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)
    ]


@pytest.fixture(scope="module")
def samples(folder):
    return all_samples(SampleReader(open_shards("data.train", str(folder))))


@pytest.mark.usefixtures("_logged_in")
@pytest.mark.parametrize("pattern", ["", "/", "/train-{000000..000002}.tar", "/tr*.tar"])
def test_the_same_shards_and_samples_as_from_files(folder, samples, pattern):
    shards = open_shards("data.train", f"s3://{BUCKET}/deep/shards{pattern}")
    local = open_shards("data.train", str(folder))
    assert (shards.shards, shards.digest) == (local.shards, local.digest)
    reader = SampleReader(shards)
    assert all_samples(reader) == samples
    reader.close()


@pytest.mark.usefixtures("_logged_in")
def test_shards_without_a_manifest_are_listed_and_entered_anywhere(folder):
    where = f"s3://{BUCKET}/deep/shards"
    shards = list_shards("data.train", where)
    assert [path.rpartition("/")[2] for path in shards.paths] == sorted(
        path.name for path in folder.glob("*.tar")
    )
    url, path = shards.paths[1], folder / "train-000001.tar"
    assert Far().opening(url)[1] == path.stat().st_size
    for part in (0.0, 0.3, 0.99):
        assert list(read_from(url, Far(), part, {})) == list(read_from(path, Far(), part, {}))


@pytest.mark.parametrize("cuts", [0, 12])
def test_connections_that_break_are_taken_up_where_they_broke(server, samples, monkeypatch, cuts):
    """Each connection is cut after a part of a block."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    with breaking(server.endpoint, after=700_000, cuts=cuts) as way:
        _use(server.environment(way.endpoint), monkeypatch)
        shards = open_shards("data.train", f"s3://{BUCKET}/deep/shards")
        reader = SampleReader(shards)
        assert all_samples(reader) == samples
        assert way.done >= cuts // 2
        reader.close()


@pytest.mark.usefixtures("_logged_in")
def test_processes_that_are_forked_and_threads_read_after_their_parent(folder):
    """obstore in a forked process whose parent has used it would wait without end."""
    store, url = Buckets(), f"s3://{BUCKET}/deep/shards/train-000000.tar"
    wanted = (folder / "train-000000.tar").read_bytes()
    assert b"".join(store.chunks(url)) == wanted
    children = [os.fork() for _ in range(2)]
    if 0 in children:
        os._exit(0 if b"".join(store.chunks(url)) == wanted else 1)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(b"".join(store.chunks(url)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    store.close()


@pytest.mark.usefixtures("_logged_in")
def test_a_reader_that_stops_early_leaves_nothing_for_the_next(folder):
    store, url = Buckets(), f"s3://{BUCKET}/deep/shards/train-000001.tar"
    chunks = store.chunks(url)
    next(chunks)
    chunks.close()
    wanted = (folder / "train-000001.tar").read_bytes()
    assert b"".join(store.chunks(url, 1000, 5000, len(wanted))) == wanted[1000:5000]
    store.close()


@pytest.mark.usefixtures("_logged_in")
def test_a_process_that_was_killed_is_started_again(folder):
    from mmscale.data import buckets

    store, url = Buckets(), f"s3://{BUCKET}/deep/shards/train-000001.tar"
    store.opening(url)
    buckets._process._running.kill()
    assert b"".join(store.chunks(url)) == (folder / "train-000001.tar").read_bytes()
    store.close()


REFUSALS = {
    "a key that does not exist": ("AKIAWRONG", "x", r"credentials are not accepted \(403 Inva"),
    "a wrong secret": (None, "guess-it", r"credentials are not accepted \(403 Signature"),
    "no right": ("stranger", None, r"the credentials may not do this.*ask for the right"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_credentials_that_are_refused_are_told_at_once_and_without_the_secret(
    server, monkeypatch, case
):
    name, secret, told = REFUSALS[case]
    environment = server.environment()
    if name == "stranger":
        name, secret = server.stranger
    environment["AWS_ACCESS_KEY_ID"] = name or server.key[0]
    environment["AWS_SECRET_ACCESS_KEY"] = secret
    _use(environment, monkeypatch)
    began = time.monotonic()
    with server.locked(), pytest.raises(DataError, match=told) as said:
        open_shards("data.train", f"s3://{BUCKET}/deep/shards")
    assert time.monotonic() - began < 5
    assert secret not in str(said.value)
    assert "\n" not in str(said.value)
    assert "manifest" not in str(said.value).partition("manifest.json")[2]
    with server.locked():
        _use(server.environment(), monkeypatch)
        open_shards("data.train", f"s3://{BUCKET}/deep/shards")


@pytest.mark.usefixtures("_logged_in")
def test_what_is_not_there_is_told_by_what_it_is():
    with pytest.raises(DataError, match=r"there is no bucket absent \(404 NoSuchBucket\); check"):
        open_shards("data.train", "s3://absent/shards")
    with pytest.raises(DataError, match=r"no manifest \(s3://pairs/nowhere/manifest.json: the st"):
        open_shards("data.train", f"s3://{BUCKET}/nowhere")
    with pytest.raises(DataError, match=r"no shard matches; name a folder"):
        open_shards("data.train", f"s3://{BUCKET}/deep/shards/x-*.tar")
    with pytest.raises(DataError, match=r"names no bucket; write s3://BUCKET/PATH"):
        open_shards("data.train", "s3:///shards")


def test_without_credentials_the_ways_to_give_some_are_named(server, monkeypatch, tmp_path):
    home = {"HOME": str(tmp_path)}
    # Nobody answers where a machine in a cloud would give some.
    _use(
        {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
            **home,
        },
        monkeypatch,
    )
    began = time.monotonic()
    with pytest.raises(DataError, match=r"AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        open_shards("data.train", f"s3://{BUCKET}/deep/shards")
    assert time.monotonic() - began < 12
    _use({"AWS_PROFILE": "mine", **home}, monkeypatch)
    with pytest.raises(DataError, match=r"there is no profile mine"):
        open_shards("data.train", f"s3://{BUCKET}/deep/shards")


def test_credentials_of_a_profile(server, monkeypatch, tmp_path):
    (tmp_path / ".aws").mkdir()
    key, secret = server.key
    (tmp_path / ".aws/credentials").write_text(
        f"[mine]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    (tmp_path / ".aws/config").write_text(f"[profile mine]\nendpoint_url = {server.endpoint}\n")
    _use({"AWS_PROFILE": "mine", "HOME": str(tmp_path)}, monkeypatch)
    with server.locked():
        assert open_shards("data.train", f"s3://{BUCKET}/deep/shards").samples == sum(SIZES)


def test_a_store_that_throttles_is_asked_again(folder, monkeypatch, samples):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    with serving(folder.parent) as web:
        # Unsigned requests for files: what S3, Google's and Azure's stores answer alike.
        _use(
            {"AWS_ENDPOINT_URL": web.url, "AWS_SKIP_SIGNATURE": "true"},
            monkeypatch,
        )
        shards = open_shards("data.train", "s3://shards")
        web.statuses = [503, 429, 500]
        reader = SampleReader(shards)
        assert all_samples(reader) == samples
        web.statuses = [503] * 100
        with pytest.raises(DataError, match=rf"503, {remote.ATTEMPTS} times in a row"):
            reader.read(0, 0)
        reader.close()


STORES = {
    "gs": {"GOOGLE_BASE_URL": "{}", "GOOGLE_SKIP_SIGNATURE": "true"},
    "az": {
        "AZURE_STORAGE_ENDPOINT": "{}",
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_SKIP_SIGNATURE": "true",
    },
}


@pytest.mark.parametrize("scheme", STORES)
def test_the_stores_of_google_and_azure_are_read_unsigned(folder, monkeypatch, samples, scheme):
    with serving(folder.parent) as web:
        _use({k: v.format(web.url) for k, v in STORES[scheme].items()}, monkeypatch)
        reader = SampleReader(open_shards("data.train", f"{scheme}://shards"))
        assert all_samples(reader) == samples
        with pytest.raises(DataError, match=r"no manifest"):
            open_shards("data.train", f"{scheme}://shards/absent")
        reader.close()


class _Refusing(BaseHTTPRequestHandler):
    """Answers every request, for a token or a file, as a store refuses a login."""

    answer = (401, b"")

    def log_message(self, *arguments):
        """Nothing on the console."""

    def do_GET(self):
        status, content = self.answer
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET


@pytest.fixture
def refusing():
    """A server whose login fails; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SECRET = "c2VjcmV0LW9mLXRoZS1hY2NvdW50LWZvci10ZXN0cw=="
LOGINS = {
    "gs, no login": (
        r"no credentials were found; set GOOGLE_APPLICATION_CREDENTIALS",
        "gs",
        {"GOOGLE_BASE_URL": "{}"},
    ),
    "gs, a file that is not there": (
        r"cannot be opened \(.*No such file.*\); set GOOGLE_APPLICATION_CREDENTIALS",
        "gs",
        {"GOOGLE_APPLICATION_CREDENTIALS": "{here}/no.json"},
    ),
    "gs, a wrong key": (
        r"the credentials are not accepted \(401\); set GOOGLE_APPLICATION_CREDENTIALS",
        "gs",
        {"GOOGLE_BASE_URL": "{}", "GOOGLE_APPLICATION_CREDENTIALS": "{here}/login.json"},
    ),
    "az, a wrong key": (
        r"the credentials are not accepted \(401\); set AZURE_STORAGE_ACCOUNT_KEY",
        "az",
        {
            "AZURE_STORAGE_ENDPOINT": "{}",
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": SECRET,
        },
    ),
    "az, a wrong secret": (
        r"the credentials are not accepted \(401\); set AZURE_STORAGE_ACCOUNT_KEY",
        "az",
        {
            "AZURE_STORAGE_ENDPOINT": "{}",
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_AUTHORITY_HOST": "{}",
            "AZURE_STORAGE_TENANT_ID": "tenant",
            "AZURE_STORAGE_CLIENT_ID": "client",
            "AZURE_STORAGE_CLIENT_SECRET": SECRET,
        },
    ),
    "az, no login": (
        r"no credentials were found; set AZURE_STORAGE_ACCOUNT_KEY",
        "az",
        {"AZURE_STORAGE_ACCOUNT_NAME": "account"},
    ),
}


@pytest.mark.parametrize("case", LOGINS)
def test_logins_of_google_and_azure_that_fail_are_one_sentence(
    refusing, monkeypatch, tmp_path, case
):
    told, scheme, settings = LOGINS[case]
    names = {"{}": refusing, "{here}": str(tmp_path)}
    given = {
        name: reduce(lambda text, pair: text.replace(*pair), names.items(), value)
        for name, value in settings.items()
    }
    (tmp_path / "login.json").write_text(json.dumps(service_account()))
    _use({"HOME": str(tmp_path), **given}, monkeypatch)
    began = time.monotonic()
    with pytest.raises(DataError, match=told) as said:
        open_shards("data.train", f"{scheme}://mine/shards")
    assert time.monotonic() - began < 20
    assert "\n" not in str(said.value)
    assert SECRET not in str(said.value)


def service_account():
    """A login of Google's with a key that nobody knows."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    form = (s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    return {
        "type": "service_account",
        "private_key": key.private_bytes(*form).decode(),
        "private_key_id": "1",
        "client_email": "nobody@nowhere",
        "client_id": "1",
    }


def test_an_account_that_is_not_named(monkeypatch):
    _use({}, monkeypatch)
    with pytest.raises(DataError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_shards("data.train", "az://container/shards")


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"s3://b/a/manifest.json: .*pip install 'mmscale\[cloud\]'"
    ):
        open_shards("data.train", "s3://b/a")


def test_shards_in_a_bucket_are_indexed_and_verified_where_they_lie(server, folder, monkeypatch):
    """Over connections that break, by two processes; the manifest is that of the same files."""
    where = bare(server, folder, "bare/train")
    local = open_shards("data.train", str(folder))
    with breaking(server.endpoint, after=700_000, cuts=8) as way:
        _use(server.environment(way.endpoint), monkeypatch)
        index(named_tars([where]), workers=2)
        assert way.done >= 4
    shards = open_shards("data.train", where)
    assert (shards.shards, shards.digest) == (local.shards, local.digest)
    _use(server.environment(), monkeypatch)
    # The images are noise.
    known = [line.replace(str(folder), where) for line in verify_all(folder)]
    assert verify_all(where, workers=2) == verify_all(f"s3://{BUCKET}/bare") == known
    whole = (folder / "train-000001.tar").read_bytes()
    put = server.client.put_object
    put(Bucket=BUCKET, Key="bare/train/train-000001.tar", Body=whole[: len(whole) // 2])
    put(Bucket=BUCKET, Key="bare/train/more.tar", Body=whole)
    server.client.delete_object(Bucket=BUCKET, Key="bare/train/train-000002.tar")
    told = verify_all(where)
    for fault in (
        rf"{where}/more.tar: is not in manifest.json",
        rf"{where}/train-000001.tar: has {len(whole) // 2} bytes, the manifest says {len(whole)}",
        rf"{where}/train-000002.tar: the store has no such object",
    ):
        assert sum(line.startswith(fault) for line in told) == 1, told
    with pytest.raises(DataError, match=rf"^{where}/train-000001.tar: .*(ends|end of data)"):
        index(named_tars([f"{where}/train-00000*.tar"]))


def test_a_server_that_takes_no_manifest_has_it_kept_here(folder, samples, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []
    with serving(folder.parent) as web:
        (folder / "manifest.json").rename(folder.parent / "aside.json")
        try:
            where = f"{web.url}/shards/train-{{000000..000002}}.tar?signature=first"
            with pytest.raises(DataError, match="have no manifest"):
                open_shards("data.train", where)
            with pytest.raises(DataError, match="gives no list of its files"):
                named_tars([f"{web.url}/shards"])
            index(named_tars([where]), tell=lines.append)
            shards = open_shards("data.train", where.replace("first", "second"))
            assert all_samples(SampleReader(shards)) == samples
            assert "cannot be written: its manifest is kept in" in lines[-1]
            assert not any(b"signature" in p.read_bytes() for p in tmp_path.rglob("*.json"))
        finally:
            (folder.parent / "aside.json").rename(folder / "manifest.json")
