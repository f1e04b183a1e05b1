"""the study `losses` over the synthetic pairs: a table of what was run, and nothing run twice."""

import json
import sys

from tests.whole.small_run import words_for, write_settings
from tools.studies.__main__ import main


def study(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tools.studies", *map(str, words)])
    return main()


def test_losses(synthetic, tmp_path, monkeypatch, capsys):
    out, figures, copy = tmp_path / "study", tmp_path / "figures.json", tmp_path / "copy.md"
    words = [
        *("losses", *words_for(synthetic, write_settings(tmp_path))),
        *("model.vision.frozen=true", "model.text.frozen=true", "data.augment=none"),
        f"data.feature_cache={tmp_path / 'features'}",
        *("train.duration=3 steps", "--seeds", 2, "--out", out, "--only", "loss=infonce"),
        *("--only", "negatives=batch", "--only", "negatives=hard", "--only"),
        *("negatives=hard batches", "--json", figures, "--page", copy),
    ]
    assert study(monkeypatch, *words) == 0
    shown = capsys.readouterr()
    page = (out / "page.md").read_text("utf-8")
    assert page == copy.read_text("utf-8")
    assert page.strip() in shown.out
    assert "after 3 updates" in page
    assert [line.split(" | ")[0] for line in page.splitlines() if "±" in line][1:] == [
        "| infonce", "| batch", "| hard", "| hard batches"
    ]  # fmt: skip
    results = json.loads(figures.read_text("utf-8"))
    assert [result["labels"]["seed"] for result in results] == [0, 0, 0, 1, 1, 1]
    assert all(0 <= result["figures"]["eval/mean"] <= 100 for result in results)
    losses = {result["figures"]["loss"] for result in results}
    assert len(losses) == 6, "seeds and negatives make a difference"
    folders = [path for path in out.iterdir() if path.is_dir()]
    assert len(folders) == 6
    assert not [p for f in folders for p in (f / "report.html", f / "checkpoints") if p.exists()]
    # Once more: everything is there already.
    before = (out / "results.jsonl").read_bytes()
    assert study(monkeypatch, *words) == 0
    assert (out / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out == shown.out


def test_an_unknown_study_names_the_known_ones(monkeypatch, capsys):
    assert study(monkeypatch, "everything") == 2
    assert "losses" in capsys.readouterr().err
