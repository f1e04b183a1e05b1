"""A trained run whose towers and data lie elsewhere now is told so with `key=value`."""

import json

import pytest

import mmscale
from mmscale.errors import ConfigError
from tests.unit.model.tiny import save_bert
from tests.whole.command import explain, run
from tests.whole.small_run import ALONE, succeed, words_for, write_settings


def test_what_has_moved_is_found_by_the_words_of_a_verb(synthetic, tmp_path):
    settings = write_settings(tmp_path)
    text = settings.read_text("utf-8").replace(
        "options: {width: 64, layers: 1, heads: 2, context_length: 32}", ""
    )
    settings.write_text(text, "utf-8")
    pairs, bert, folder = tmp_path / "pairs", save_bert(tmp_path / "bert"), tmp_path / "run"
    pairs.symlink_to(synthetic.val)
    words = [*words_for(synthetic, settings), f"model.text.name=hf:{bert}", f"data.eval={pairs}"]
    succeed([*ALONE, *words, "train.duration=1 steps", f"run.dir={folder}"])
    mmscale.load(folder)

    bert.rename(tmp_path / "moved")
    pairs.unlink()
    moved = [f"model.text.name=hf:{tmp_path / 'moved'}", f"data.eval={synthetic.val}"]
    done = run(["mmscale", "doctor", folder, *moved, "--json", tmp_path / "x.json"], cwd=tmp_path)
    assert done.returncode in (0, 3), explain(done)
    assert json.loads((tmp_path / "x.json").read_text("utf-8"))["verdict"]

    model, _, tokenizer = mmscale.load(folder, moved[0], "engine.device=cpu")
    assert model.encode_text(tokenizer(["a dog"])).shape == (1, 32)
    with pytest.raises(ConfigError, match=r"^model\.embed_dim cannot be said anew"):
        mmscale.load(folder, "model.embed_dim=64")


def test_overrides_that_a_verb_cannot_use_are_refused(tmp_path):
    (tmp_path / "x.npz").touch()
    done = run(["mmscale", "doctor", tmp_path / "x.npz", "data.eval=y"])
    assert done.returncode == 2, explain(done)
    assert "data.eval=y" in done.stderr
    done = run(["mmscale", "report", tmp_path, "data.eval=y"])
    assert done.returncode == 2, explain(done)
    assert "--data" in done.stderr
