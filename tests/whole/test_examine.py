"""`mmscale examine` on shards: what it tells, writes, and ends with."""

import json

import pytest

from mmscale.cli import entry
from mmscale.data.index import index
from mmscale.errors import explained
from tests.whole.command import explain, run
from tests.whole.small_run import write_settings
from tests.whole.test_foreign_shards import write


@pytest.mark.slow
def test_blank_images_and_those_of_the_evaluation_set_are_told(tmp_path):
    write(tmp_path / "data" / "0.tar", [(f"{n:05d}", n, f"a picture {n}") for n in range(8)])
    write(tmp_path / "held" / "0.tar", [(f"x{n:04d}", n, f"a picture {n}") for n in range(6, 10)])
    for name in ("data", "held"):
        index([tmp_path / name / "0.tar"])
    words = ["--against", tmp_path / "held", "--workers", "1", "--json", tmp_path / "found.json"]
    done = run(["mmscale", "examine", tmp_path / "data", *words])
    assert done.returncode == 3, explain(done)
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    # Each is of one colour; numbers 6 and 7 have the bytes of the other set's.
    assert [(one["verdict"], one["share"]) for one in found["verdicts"]] == [
        ("leakage", 0.5),
        ("broken_images", 1.0),
    ]
    assert found["verdicts"][0]["examples"][0]["partner"] == "x0006"
    assert found["ceiling"]["t2i_r1"] == 100
    assert "2 of 4 evaluation images show a picture of the data" in done.stdout


@pytest.mark.slow
def test_towers_that_settings_name_look_at_the_pairs_once(synthetic, tmp_path):
    """The captions are longer than this tower's 8 tokens; features that are kept are used again."""
    words = [write_settings(tmp_path), "model.text.options.context_length=8"]
    words = ["mmscale", "examine", synthetic.train, *words, "--json", tmp_path / "found.json"]
    for is_first in (True, False):
        done = run(words, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
        assert done.returncode == 3, explain(done)
        assert ("images through the frozen towers, once" in done.stderr) == is_first
    assert "too few" not in done.stdout
    (verdict,) = json.loads((tmp_path / "found.json").read_text("utf-8"))["verdicts"]
    assert verdict["verdict"] == "cut_captions"
    assert "more than 8 tokens" in verdict["sentence"]
    assert verdict["held_out"] is None


def test_what_examine_cannot_use_is_told_with_its_exit_code(
    synthetic, tmp_path, monkeypatch, capsys
):
    sets = tmp_path / "sets.yaml"
    sets.write_text(f"pets: {{data: {synthetic.val}, kind: classes, classes: imagenet}}", "utf-8")
    for words, code, sentence in (
        ([tmp_path / "nothing"], 4, "nothing"),
        ([synthetic.train, "--sets", sets], 2, "is of kind classes"),
        ([synthetic.train, "--model", tmp_path / "no-run"], 2, "no such run"),
        ([synthetic.train, "model.vision.nome=x"], 2, "model.vision.nome"),
    ):
        monkeypatch.setattr("sys.argv", ["mmscale", "examine", *map(str, words)])
        assert explained(entry._invoke) == code
        assert sentence in capsys.readouterr().err
