"""Benchmarks: what they refuse, and that the comparison of data loading runs."""

import json
import sys

import pytest
from PIL import Image

from mmscale.data.manifest import read_manifest
from mmscale.errors import ConfigError
from tools.bench import data, results, step
from tools.bench.__main__ import main
from tools.bench.results import Result


def bench_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tools.bench", *words])
    return main()


@pytest.fixture
def without_peers(monkeypatch, tmp_path):
    """An environment in which `make peers` was not run."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


@pytest.fixture
def with_peers():
    try:
        results.peers_folder()
    except ConfigError:
        pytest.skip("make peers was not run")


@pytest.mark.usefixtures("without_peers")
@pytest.mark.parametrize("name", results.BENCHES)
def test_without_peers_it_says_how_to_get_them(monkeypatch, capsys, name):
    assert bench_command(monkeypatch, name) == 2
    assert "make peers" in capsys.readouterr().err


def test_an_unknown_bench_names_the_known_ones(monkeypatch, capsys):
    assert bench_command(monkeypatch, "everything") == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ("everything", *results.BENCHES))


def test_results_are_written_and_shown(monkeypatch, tmp_path, capsys):
    found = [
        Result("data, 1 worker", "samples_per_second", 768, 1, "cpu", 900.0, 300.0, 3.0, 1000.0),
        Result("step", "time_s", 8, 2, "cpu", 0.25, None, None, None),
    ]
    monkeypatch.setattr("tools.bench.results.run", lambda name, device: found)
    path = tmp_path / "figures.json"
    assert bench_command(monkeypatch, "data", "--json", str(path)) == 0
    written = json.loads(path.read_text("utf-8"))["results"]
    assert [Result(**entry) for entry in written] == found
    assert set(written[0]) == {
        "name", "metric", "n", "ranks", "device", "ours", "peer", "ratio", "limit"
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["data,", "1", "worker"]
    assert lines[2].split()[-3:] == ["-", "-", "-"]


def test_its_pictures_are_as_heavy_as_photographs(tmp_path):
    data.render(tmp_path / "pictures", 12)
    paths = sorted((tmp_path / "pictures").glob("*.jpg"))
    assert len(paths) == 12
    assert {Image.open(path).size for path in paths} == {(500, 375)}
    bits = 8 * sum(path.stat().st_size for path in paths) / (12 * 500 * 375)
    assert 1.5 < bits < 2.5, (
        "20 COCO photographs of this size and quality take 0.8 to 3.1, mean 2.0"
    )


@pytest.mark.usefixtures("with_peers")
def test_data_is_compared_with_open_clips_own_pipeline(tmp_path):
    shards = data.prepare(tmp_path, 24)
    assert read_manifest(shards).samples == 24
    (result,) = data.measure(shards, batch=4, warm=1, count=2, rounds=1, workers=(1,))
    assert result.ours > 0
    assert result.peer > 0
    assert result.limit > 0
    assert result.ratio == result.ours / result.peer
    assert (result.n, result.ranks, result.device) == (24, 1, "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("with_peers")
@pytest.mark.parametrize(("ranks", "chunks"), [(1, 2), (2, 1)])
def test_an_update_is_compared_with_open_clips_own(capsys, ranks, chunks):
    found = step.compare("step", 4, 12, chunks, ranks, steps=1, rounds=1)
    assert [result.metric for result in found] == ["time_s", "memory_bytes"]
    for result in found:
        assert (result.n, result.ranks, result.device) == (4, ranks, "cpu")
        assert result.ours > 0
        assert result.peer > 0
        assert result.ratio == result.ours / result.peer
    told = capsys.readouterr().err.splitlines()
    counts = {line.split()[-2] for line in told}
    assert len(counts) == 1, "both sides train the same number of parameters"
