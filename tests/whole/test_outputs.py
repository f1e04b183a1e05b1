"""Where a command cannot write, it says so before its work: exit 2, one sentence, nothing made."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_outputs import bound_by_permissions
from tests.whole.command import explain, run
from tests.whole.small_run import ALONE, succeed, words_for, write_settings

# None of what these read is there: they are refused before anything is opened.
VERBS = {
    "doctor none --json": "--json",
    "eval none --data none --json": "--json",
    "embed none --data none --out": "--out",
    "verify none --json": "--json",
    "plan demo --json": "--json",
    "plan demo --plot": "--plot",
    "export none --to onnx --out": "--out",
    "synth --images 5 --out": "--out",
    "pack none --out": "--out",
    "compare none --out": "--out",
    "sweep none.yaml --out": "--out",
    "models --json": "--json",
}


@pytest.fixture
def afile(tmp_path) -> Path:
    path = tmp_path / "afile"
    path.write_text("x")
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_an_output_that_cannot_be_written(verb, afile):
    place = afile / "below" / "x.html"
    done = run(["mmscale", *verb.split(), place], cwd=afile.parent)
    assert done.returncode == 2, explain(done)
    assert done.stderr.splitlines() == [
        f"mmscale: {VERBS[verb]} {place}: cannot be written: a file stands where a folder is "
        "needed; name another place"
    ]
    assert not done.stdout
    assert list(afile.parent.iterdir()) == [afile]


def test_a_home_folder_is_found_in_options_too(tmp_path):
    done = succeed(["mmscale", "models", "--json=~/new/x.json"], env={"HOME": str(tmp_path)})
    assert (tmp_path / "new" / "x.json").exists(), explain(done)
    done = run(["mmscale", "models", "--json", "$HOME/x.json"], cwd=tmp_path)
    assert done.returncode == 2
    assert "--json $HOME/x.json: `$HOME` is not filled in" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_verdict_is_said_before_a_full_disk_is_met(tmp_path):
    rows = np.eye(64, dtype=np.float32)
    np.savez(tmp_path / "pairs.npz", image=rows, text=rows)
    done = run(["mmscale", "doctor", tmp_path / "pairs.npz", "--json", "/dev/full"])
    assert done.returncode == 2, explain(done)
    assert done.stdout.startswith("verdict: ")
    assert "--json /dev/full: cannot be written: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "setting",
    ["run.dir", "data.feature_cache", pytest.param("data.decoded_cache", marks=pytest.mark.slow)],
)
def test_a_run_refuses_folders_that_it_cannot_fill(setting, synthetic, tmp_path, afile):
    words = [*words_for(synthetic, write_settings(tmp_path)), f"run.dir={tmp_path / 'run'}"]
    frozen = ["model.vision.frozen=true", "model.text.frozen=true", "data.augment=none"]
    done = run([*ALONE, *words, *frozen, f"{setting}={afile}"])
    assert done.returncode == 2, explain(done)
    assert f"mmscale: {setting}={afile}: cannot be written: a file stands" in done.stderr
    assert "Traceback" not in done.stderr
    # The towers have not run over the data for a cache that cannot be kept.
    assert "images through the frozen towers" not in done.stderr


def test_the_page_of_a_run_that_may_only_be_read_is_refused_at_once(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    folder.chmod(0o555)
    done = run([*bound_by_permissions(), "mmscale", "report", folder])
    assert done.returncode == 2, explain(done)
    assert f"{folder / 'report.html'}: cannot be written: this user may not" in done.stderr


def test_a_reader_that_closes_the_pipe_causes_no_error():
    done = run(["bash", "-c", "mmscale models | head -n 1; exit ${PIPESTATUS[0]}"])
    assert done.returncode in (0, 141), explain(done)
    assert not done.stderr
