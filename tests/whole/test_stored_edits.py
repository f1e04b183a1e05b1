"""A configuration that somebody stored runs nothing and opens nothing; the user's words do."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.sealed import read_state_of, seal
from tests.unit.data.web_server import serving
from tests.whole.command import ROOT, explain, run
from tests.whole.small_run import ALONE, succeed, words_for, write_settings


@pytest.fixture(scope="module")
def stored(synthetic, tmp_path_factory):
    """A short run, and the words that it was started with but for its folder."""
    folder = tmp_path_factory.mktemp("stored")
    words = [*words_for(synthetic, write_settings(folder)), "data.workers=0"]
    succeed([*ALONE, *words, f"run.dir={folder / 'run'}", "train.duration=2 steps"])
    return folder / "run", words


def _canary(trial: Path, synthetic) -> None:
    """What must not be opened: shards, weights, a model's folder with a tokenizer."""
    shutil.copytree(synthetic.train, trial / "canary")
    for name in ("config.json", "tokenizer.json", "open_clip_config.json", "config.yaml"):
        (trial / "canary" / name).write_text("{}")
    (trial / "canary" / "secret.safetensors").write_bytes(bytes(64))


def _try(stored, synthetic, trial, verb, count):
    """What each of some edits did, the first of them none, and what a web server was asked for."""
    run_dir, words = stored
    _canary(trial, synthetic)
    if verb == "train":
        asked = [*words, f"run.dir={trial / 'run'}", "train.duration=3 steps"]
    else:
        asked = [verb, trial / "run", "--data", synthetic.val]
    with serving(trial / "canary") as server:
        command = [sys.executable, "-m", "tests.whole.stored_edits", run_dir, trial, 11, count]
        # What asks the hub asks this server.
        hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "HF_HOME": str(trial / "hub")}
        hub |= {"AWS_ENDPOINT_URL": server.url, "AWS_SKIP_SIGNATURE": "true"}
        hub["PYTHONPATH"] = str(ROOT)
        done = run(
            [*command, server.url, trial / "found.json", verb, *asked],
            env=hub,
            timeout=60 + 20 * count,
        )
        assert done.returncode == 0, explain(done)
        requests = [path for path, _, _ in server.requests]
    return json.loads((trial / "found.json").read_text()), requests


def _assert_nothing_ran(results, requests, trial, codes):
    assert results[0]["code"] == 0, results[0]["said"]
    assert not (trial / "made").exists()
    assert requests == []
    for result in results[1:]:
        assert result["found"] == [], (result["edit"], result["said"])
        assert result["code"] in codes, (result["edit"], result["said"])
        assert "Traceback" not in result["said"], (result["edit"], result["said"])
    assert Counter(result["code"] for result in results).most_common(1)[0][0] != 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_edits_of_a_stored_configuration_run_and_open_nothing_on_resume(
    stored, synthetic, tmp_path, count
):
    """Refused as another run (2) or as no configuration (5), or not looked at (0)."""
    results, requests = _try(stored, synthetic, tmp_path, "train", count)
    _assert_nothing_ran(results, requests, tmp_path, {0, 2, 5})


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_edits_of_a_stored_configuration_run_nothing_when_it_is_evaluated(
    stored, synthetic, tmp_path, count
):
    """Folders on this machine may be read: what they hold is data."""
    results, requests = _try(stored, synthetic, tmp_path, "eval", count)
    for result in results:
        result["found"] = [each for each in result["found"] if not each.startswith("open ")]
    _assert_nothing_ran(results, requests, tmp_path, {0, 2, 5})


@pytest.mark.parametrize(
    "where",
    [
        "{}",
        pytest.param("s3://attacker/data", marks=pytest.mark.slow),
        pytest.param("hf://datasets/attacker/data", marks=pytest.mark.slow),
    ],
)
def test_a_verb_opens_no_address_that_only_the_run_names(stored, synthetic, tmp_path, where):
    run_dir = tmp_path / "run"
    shutil.copytree(stored[0], run_dir)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    state = read_state_of(checkpoint)
    with serving(synthetic.val) as server:
        state["config"]["data"]["eval"] = where.format(server.url)
        seal(checkpoint, state)
        env = {"AWS_ENDPOINT_URL": server.url, "AWS_SKIP_SIGNATURE": "true"}
        env |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url}
        done = run([sys.executable, "-m", "mmscale.cli", "doctor", run_dir], env=env)
        assert server.requests == []
    assert done.returncode == 4, explain(done)
    assert "none is opened that you have not named yourself; name the pairs with --data" in (
        done.stderr
    )
