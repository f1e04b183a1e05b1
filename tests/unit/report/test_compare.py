import json
import statistics
from html.parser import HTMLParser

import pytest
import yaml
from typer.testing import CliRunner

from mmscale.cli import app
from mmscale.errors import ConfigError, DataError
from mmscale.report.compare import compare, comparison_json, comparison_table
from mmscale.report.compare_page import write_comparison
from mmscale.report.metrics import MEAN_RECALL, RECALLS

EVIL = "<script>alert('x')</script>"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder: `make_run("a", 41.5, lr=1e-3, seed=1)` ends with every recall 41.5."""

    def make(name, recall, *, lr=1e-3, seed=0, pairs=32, **run):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {
            "run": {"dir": str(folder), "seed": seed, **run},
            "optim": {"lr": lr, "betas": [0.9, 0.98]},
            "train": {"global_batch_size": pairs},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        lines = [{"step": step, "loss": 4 / step} for step in range(1, 21)]
        if recall is not None:
            early, late = (dict.fromkeys(RECALLS, value) for value in (1.0, recall))
            lines.insert(10, {"step": 10, **early})
            lines.append({"step": 20, **late})
        lines.append({"finished": True, "step": 20})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_runs_that_differ_by_their_seed_are_one_group_with_its_spread(make_run):
    recalls = [40.0, 43.0, 41.0]
    low = [make_run(f"low-{s}", r, lr=1e-4, seed=s) for s, r in enumerate(recalls)]
    high = make_run("high", 50.0, lr=1e-3)
    found = compare([*low, high])
    assert [[run.name for run in group.runs] for group in found.groups] == [
        ["low-0", "low-1", "low-2"],
        ["high"],
    ]
    spread, alone = (group.spread(MEAN_RECALL) for group in found.groups)
    assert spread is not None
    assert spread.mean == pytest.approx(statistics.fmean(recalls))
    assert spread.std == pytest.approx(statistics.stdev(recalls))
    assert spread.n == 3
    assert alone is not None
    assert (alone.mean, alone.std, alone.n) == (50.0, None, 1)


def test_settings_that_differ_are_told_and_others_are_not(make_run):
    runs = [make_run("a", 1.0, lr=1e-3), make_run("b", 2.0, lr=2e-3, overwrite=True)]
    assert dict(compare(runs).differing) == {"optim.lr": (1e-3, 2e-3)}
    text = comparison_table(compare(runs))
    assert "a  0.001\nb  0.002\n" in text
    assert "betas" not in text


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run):
    runs = [make_run("x/run", 1.0), make_run("y/run", 2.0)]
    assert [run.name for run in compare(runs).runs] == ["x/run", "y/run"]


def test_a_run_without_an_evaluation_takes_no_part_in_the_spread(make_run):
    runs = [make_run("a", 10.0, seed=0), make_run("b", 20.0, seed=1), make_run("c", None, seed=2)]
    (group,) = comparison_json(compare(runs))["groups"]
    assert group["recalls"][MEAN_RECALL] == {"mean": 15.0, "std": pytest.approx(50**0.5), "n": 2}
    assert group["seeds"] == [0, 1, 2]


def test_the_last_evaluation_counts(make_run):
    (first, _) = comparison_json(compare([make_run("a", 33.0), make_run("b", 1.0)]))["runs"]
    assert first["recalls"] == {**dict.fromkeys(RECALLS, 33.0), MEAN_RECALL: 33.0}
    assert (first["step"], first["loss"], first["finished"]) == (20, 0.2, True)


def test_fewer_than_two_runs_and_twice_the_same_are_refused(make_run):
    run = make_run("a", 1.0)
    with pytest.raises(ConfigError, match="two run folders or more"):
        compare([run])
    with pytest.raises(ConfigError, match="named twice"):
        compare([run, run.parent / "." / "a"])


def test_a_folder_without_a_run_is_named(make_run, tmp_path):
    with pytest.raises(DataError, match="nothing: holds no run"):
        compare([make_run("a", 1.0), tmp_path / "nothing"])


@pytest.mark.parametrize("pairs", [32, 64])
def test_pictures_are_written_also_over_batches_of_several_sizes(make_run, tmp_path, pairs):
    runs = [make_run("a", 10.0), make_run("b", None, pairs=pairs, lr=2e-3)]
    out = tmp_path / "new" / "runs.png"
    write_comparison(out, compare(runs))
    assert out.read_bytes().startswith(PNG)


def test_the_page_shows_tables_and_picture_and_text_stays_text(make_run, tmp_path):
    class Reader(HTMLParser):
        tags, text = (), ""

        def handle_starttag(self, tag, attrs):
            self.tags = (*self.tags, tag)

        def handle_data(self, data):
            self.text += data

    runs = [make_run("a", 40.0, lr=EVIL), make_run("b", 44.0, lr=1e-3)]
    out = tmp_path / "runs.html"
    write_comparison(out, compare(runs))
    reader = Reader()
    reader.feed(out.read_text("utf-8"))
    assert "script" not in reader.tags
    assert "img" in reader.tags
    for part in ("2 runs compared", "optim.lr", EVIL, "44.0", "0.2000"):
        assert part in reader.text


def test_the_verb_prints_and_writes(make_run, tmp_path):
    runs = [str(make_run(name, 40.0, seed=seed)) for seed, name in enumerate("ab")]
    out, figures = tmp_path / "o.html", tmp_path / "o.json"
    done = CliRunner().invoke(app, ["compare", *runs, "--out", str(out), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert "40.0 ± 0.0" in done.output
    assert out.exists()
    assert json.loads(figures.read_text())["differing"] == {"run.seed": [0, 1]}


def test_a_file_of_another_kind_is_refused_before_anything_is_read(tmp_path):
    done = CliRunner().invoke(app, ["compare", "a", "b", "--out", str(tmp_path / "o.pdf")])
    assert isinstance(done.exception, ConfigError)
    assert ".html or .png" in str(done.exception)
