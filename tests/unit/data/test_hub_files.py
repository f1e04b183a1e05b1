"""Shards of a data set on the hub, which is one on loopback."""

import pytest
from huggingface_hub import constants

from mmscale.data import remote
from mmscale.data.far import Far
from mmscale.data.reader import SampleReader
from mmscale.data.shards import open_shards
from mmscale.errors import DataError
from tests.hub import running_hub
from tests.unit.data.tars import write_shards

SIZES = [30, 20]
PAGE = "datasets/org/pairs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("hub") / "shards", SIZES, 100_000)


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    """A private data set, whose files another host keeps, for somebody who is logged in."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    with running_hub() as running:
        for name, value in running.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files = {f"train/{path.name}": path.read_bytes() for path in folder.iterdir()}
        running.files = {(PAGE, "main"): files, (PAGE, "v1"): files}
        running.private, running.elsewhere = {PAGE}, True
        yield running


@pytest.mark.parametrize("pattern", ["", "@v1", "/train-{000000..000001}.tar", "/train-*.tar"])
def test_the_same_samples_as_from_files(hub, folder, pattern):
    at, rest = (pattern, "") if pattern.startswith("@") else ("", pattern)
    shards = open_shards("data.train", f"hf://{PAGE}{at}/train{rest}")
    local = open_shards("data.train", str(folder))
    assert (shards.shards, shards.digest) == (local.shards, local.digest)
    reader, files = SampleReader(shards), SampleReader(local)
    for shard, size in enumerate(SIZES):
        for sample in range(size):
            assert reader.read(shard, sample) == files.read(shard, sample)
    reader.close()
    # The token is for the hub, which is asked once a file; the host that keeps it never sees one.
    assert hub.leaked == []
    asked = [line for line in hub.asked if "train-000000" in line]
    assert sum("/kept/" not in line for line in asked) == 1
    assert sum("/kept/" in line for line in asked) > 1


def test_an_address_that_expires_is_asked_for_anew(hub, folder):
    far, url = Far(), f"hf://{PAGE}/train/train-000000.tar"
    wanted = (folder / "train-000000.tar").read_bytes()
    assert far.opening(url) == (wanted[:512], len(wanted))
    hub.refusals = {"/kept": 403}
    with pytest.raises(DataError, match="403"):
        far.opening(url)
    hub.refusals = {}
    far._hub._kept_at[url] = f"{hub.endpoint}/kept/gone"
    assert far.opening(url)[0] == wanted[:512]


REFUSALS = {
    f"hf://{PAGE}/absent": r"no manifest \(hf://datasets/org/pairs/absent/manifest.json: the data",
    f"hf://{PAGE}@v9/train": r"the data set has no revision v9; name a branch",
    "hf://datasets/org": r"hf://datasets/org/manifest\.json: .*no|is no data set of the hub",
    f"hf://{PAGE}/train/x-*.tar": r"no shard matches",
}


@pytest.mark.parametrize("where", REFUSALS)
def test_what_is_not_there(hub, where):
    with pytest.raises(DataError, match=REFUSALS[where]):
        open_shards("data.train", where)


@pytest.mark.parametrize("pattern", ["", "/train-*.tar"])
def test_without_a_token_a_private_data_set_is_told_with_how_to_log_in(hub, monkeypatch, pattern):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DataError, match=r"no data set org/pairs, or your token may.*HF_TOKEN"):
        open_shards("data.train", f"hf://{PAGE}/train{pattern}")


def test_where_the_hub_is_not_to_be_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="is not fetched where HF_HUB_OFFLINE is set; unset it"):
        open_shards("data.train", f"hf://{PAGE}/train")
    assert hub.asked == []
