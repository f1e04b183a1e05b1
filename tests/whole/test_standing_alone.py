"""A run is used where nothing is left but the run; what a stranger stored in one does not run."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mmscale.checkpoint.state import FileRecord, write_state
from mmscale.errors import ConfigError
from mmscale.evaluation.trained import load_trained
from tests.unit.model.test_foreign import bring_code, save_openclip
from tests.unit.model.test_kept import save_clip_with_tokenizer
from tests.unit.model.tiny import save_bert
from tests.whole.command import run
from tests.whole.small_run import ALONE, SETTINGS, succeed

TOWERS = (
    "text: {name: 'hf:bert', weights: pretrained}",
    "vision: {name: timm:test_convnext, weights: random}",
)
# Each verb, one after the other, and the loading function, in one process.
VERBS = """
import json, sys
from mmscale.cli import app
run, data, out = sys.argv[1:]
codes = {}
for name, words in {
    "eval": ["--data", data, "--json", out + "/eval.json"],
    "embed": ["--data", data, "--out", out + "/pairs.npz"],
    "doctor": ["--data", data, "--json", out + "/doctor.json"],
    "export": ["--to", "open_clip", "--out", out + "/export"],
}.items():
    codes[name] = app([name, run, *words], standalone_mode=False)
import mmscale, torch
model, transform, tokenizer = mmscale.load(run)
with torch.no_grad():
    row = model.encode_text(tokenizer(["a red square"]), normalize=True)[0].tolist()
print(json.dumps({"codes": codes, "row": row}))
"""


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory) -> Path:
    """A folder with `run`, trained in it over `bert`, and what `mmscale eval` found."""
    folder = tmp_path_factory.mktemp("made")
    save_bert(folder / "bert")
    settings = SETTINGS[: SETTINGS.index("  vision:")] + "".join(f"  {t}\n" for t in TOWERS)
    settings += SETTINGS[SETTINGS.index("  embed_dim:") :]
    (folder / "settings.yaml").write_text(settings)
    words = ["settings.yaml", f"data.train={synthetic.train}", "run.dir=run"]
    succeed([*ALONE, *words, "train.duration=3 steps"], cwd=folder)
    succeed(
        ["mmscale", "eval", "run", "--data", synthetic.val, "--json", "before.json"], cwd=folder
    )
    return folder


def test_every_verb_works_where_the_towers_folder_is_gone(made, synthetic, tmp_path):
    shutil.copytree(made / "run", tmp_path / "elsewhere")
    elsewhere = tmp_path / "another" / "place"
    elsewhere.mkdir(parents=True)
    moved = made / "bert"
    moved.rename(made / "gone")
    try:
        done = succeed(
            [sys.executable, "-c", VERBS, tmp_path / "elsewhere", synthetic.val, tmp_path],
            cwd=elsewhere,
            env={"HF_HUB_OFFLINE": "1"},
            timeout=240,
        )
    finally:
        (made / "gone").rename(moved)
    said = json.loads(done.stdout.splitlines()[-1])
    assert {name: code in (0, 3) for name, code in said["codes"].items()} == dict.fromkeys(
        ("eval", "embed", "doctor", "export"), True
    )
    assert said["codes"]["eval"] == said["codes"]["export"] == 0
    before = json.loads((made / "before.json").read_text())
    assert json.loads((tmp_path / "eval.json").read_text()) == before
    assert np.load(tmp_path / "pairs.npz")["image"].shape[1] == len(said["row"])


def restored(checkpoint: Path, change) -> None:
    """A checkpoint whose state a stranger changed, its digests made anew."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    for name in state["files"]:
        state["files"][name] = FileRecord.of(checkpoint / name).model_dump()
    write_state(checkpoint, state)


@pytest.mark.parametrize(
    "where",
    [
        "kept",
        "outside",
        pytest.param("outside_text_tower", marks=pytest.mark.slow),
        pytest.param("hub", marks=pytest.mark.slow),
    ],
)
def test_evaluating_a_checkpoint_runs_nothing_that_it_brings(made, synthetic, tmp_path, where):
    marker = tmp_path / "ran"
    shutil.copytree(made / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    evil = save_clip_with_tokenizer(tmp_path / "evil")
    bring_code(evil, marker)
    text = {"hf_model_name": "evil", "hf_tokenizer_name": "evil", "context_length": 16}
    save_openclip(tmp_path / "over", {**text, "tokenizer_kwargs": {"trust_remote_code": True}})
    names = {
        "outside": f"openclip:local-dir:{evil}",
        "outside_text_tower": f"openclip:local-dir:{tmp_path / 'over'}",
        "hub": "hf:who/evil",
    }
    if where == "kept":
        bring_code(checkpoint / "text", marker)

    def change(state):
        if where != "kept":
            state["config"]["model"]["text"] |= {"name": names[where], "options": {}}
            state["files"] = {n: f for n, f in state["files"].items() if "text/" not in n}

    restored(checkpoint, change)
    done = run(
        ["mmscale", "eval", tmp_path / "run", "--data", synthetic.val],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert done.returncode == 2, done.stderr
    assert not marker.exists()
    assert "Traceback" not in done.stderr
    if where != "kept":
        assert f"model.text.name={names[where]} is named by the checkpoint" in done.stderr
    assert "nothing is fetched" in done.stderr if where == "hub" else True


def test_an_export_that_cannot_be_is_refused_before_the_model_is_built(made, tmp_path, monkeypatch):
    done = run(["mmscale", "export", made / "run", "--to", "hf", "--out", tmp_path / "out"])
    assert done.returncode == 2
    assert "model.vision.name=timm:test_convnext" in done.stderr
    assert "export to open_clip" in done.stderr
    assert not (tmp_path / "out").exists()

    def build(*_, **__):
        raise AssertionError("the model was built")

    def refuse(config):
        raise ConfigError(f"no {config.model.vision.name}")

    monkeypatch.setattr("mmscale.evaluation.trained.build_model", build)
    with pytest.raises(ConfigError, match="no timm:test_convnext"):
        load_trained(made / "run", (), refuse)
