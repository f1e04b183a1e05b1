import json
import statistics
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image
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


@pytest.fixture
def of_sets(make_run):
    """Two seeds with `main`, `coco` and `pets`, and a run of `data.eval` and `pets` alone."""
    runs = [make_run("a", 40.0, seed=0), make_run("b", 42.0, seed=1), make_run("c", 9.0, lr=1.0)]
    for place, run in enumerate(runs):
        pets = {"eval/pets/top1": 50.0 + place, "eval/pets/mean_per_class": 45.0}
        coco = {f"eval/coco/{key.removeprefix('eval/')}": 20.0 + 2 * place for key in RECALLS}
        old = dict.fromkeys((*pets, *coco), 1.0)
        with (run / "metrics.jsonl").open("a") as log:
            for step, line in ((20, old), (30, pets | coco)):
                kept = {key: v for key, v in line.items() if place < 2 or "coco" not in key}
                log.write(json.dumps({"step": step, **kept}) + "\n")
    return runs


def test_every_set_of_any_run_has_a_table_and_runs_without_it_are_said_to(of_sets, tmp_path):
    found = comparison_json(compare(of_sets))
    two, alone = found["groups"]
    for key in (f"eval/coco/{RECALLS[0].removeprefix('eval/')}", "eval/coco/mean"):
        assert two["sets"]["coco"][key] == {"mean": 21.0, "std": pytest.approx(2**0.5), "n": 2}
    assert alone["sets"]["coco"] == {}
    assert alone["sets"]["pets"]["eval/pets/top1"]["mean"] == 52.0
    assert [run["sets"]["coco"] is None for run in found["runs"]] == [False, False, True]
    text = comparison_table(compare(of_sets))
    tables = {part.split(",")[0].strip(): part.split("\n") for part in text.split("\n\n")[1:]}
    assert set(tables) == {"data.eval", "coco", "pets"}
    assert tables["coco"][1].split()[-3:] == ["21.0", "±", "1.4"]
    assert tables["coco"][2].split()[1:] == ["0", *["n/a"] * 7]
    assert tables["pets"][0].split()[-4:] == ["top1", "mean", "per", "class"]
    assert tables["pets"][2].split()[1:] == ["1", "52.0", "45.0"]
    assert tables["data.eval"][2].split()[1:] == ["1", *["9.0"] * 7]
    write_comparison(tmp_path / "page.html", compare(of_sets))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert [name in page for name in ("set-data.eval", "set-coco", "set-pets")] == [True] * 3
    assert ">n/a<" in page
    write_comparison(tmp_path / "all.png", compare(of_sets))
    write_comparison(tmp_path / "one.png", compare(of_sets[:2]))
    sizes = [Image.open(tmp_path / name).size for name in ("all.png", "one.png")]
    assert sizes[0][1] > sizes[1][1]


def test_runs_without_data_eval_are_compared_on_their_sets(of_sets, tmp_path):
    for run in of_sets:
        log = run / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k not in RECALLS} for line in lines]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    found = compare(of_sets)
    assert set(found.sets) == {"coco", "pets"}
    assert comparison_json(found)["groups"][0]["recalls"] == {}
    write_comparison(tmp_path / "page.html", found)


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
