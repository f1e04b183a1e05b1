"""Whole runs on a card that is not there: what they would refuse, how often they would wait.

`card.py` says what the emulation sees and what it does not.
"""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import SyntheticPairs
from tests.emulated.run import SPOILT, STOPPED
from tests.unit.model.tiny import save_bert
from tests.unit.model.whole_hf import save_whole
from tests.whole.command import explain, run
from tests.whole.small_run import training_lines, words_for, write_settings

# The last two of seven: updates that wait for nothing but the record of the one before them.
LENGTH, UPDATES = "train.duration=7 steps", (4, 5, 6)
CHUNKS = ["train.micro_batch_size=4"]
QUEUE = ["negatives.queue={size: 40, source: momentum}", "eval.weights=ema"]
MINING = ["negatives.queue.size=40", "negatives.mining={kind: semi_hard, share: 0.2}"]
QUIET = ["log.every=7 steps", "probe.every=7 steps"]


def taught_by(folder: Path) -> str:
    """Terms with a whole model of another size of pictures."""
    save_whole(folder, "clip")
    terms = [{"kind": "teacher", "model": f"hf:{folder}"}, {"kind": "infonce"}]
    return f"loss.terms={json.dumps(terms)}"


def run_on(
    where: str, words: list[str], folder: Path, pairs: SyntheticPairs, code: int = 0, **env: str
) -> list[list]:
    """What made the host wait: phase, operation, callers and how often."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "waits.json"
    command = [sys.executable, "-m", "tests.emulated.run", where, report]
    given = [*words_for(pairs, write_settings(folder)), f"run.dir={folder / 'run'}", LENGTH]
    done = run([*command, *given, *words], env=env, timeout=300)
    assert done.returncode == code, explain(done)
    return json.loads(report.read_text("utf-8"))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([*CHUNKS, *QUEUE, "engine.precision=bf16"], id="chunks, queue and momentum"),
        pytest.param(["loss.preset=siglip"], id="siglip"),
        pytest.param([*CHUNKS, "HF"], id="a hub's text tower"),
        pytest.param(["TEACHER", *CHUNKS], id="a teacher", marks=pytest.mark.slow),
        pytest.param([*MINING, "engine.precision=fp32"], id="mining", marks=pytest.mark.slow),
    ],
)
def test_an_update_waits_for_nothing_but_the_record_of_the_one_before(words, synthetic, tmp_path):
    tower = f"model.text={{name: 'hf:{save_bert(tmp_path / 'bert')}', options: {{}}}}"
    made = {"HF": lambda: tower, "TEACHER": lambda: taught_by(tmp_path / "clip")}
    words = [made[word]() if word in made else word for word in words]
    found = run_on("card", [*words, *QUIET], tmp_path, synthetic)
    for update in UPDATES:
        inside = [row for row in found if row[0] == f"update {update}"]
        assert inside == []
        after = [row for row in found if row[0] == f"after {update}"]
        assert [(operation, count) for _, operation, _, count in after] == [("event", 1)]
    # A line of the log waits for the stamps of its update too.
    everything = {operation for _, operation, _, _ in found}
    assert "event" in everything


def test_a_spoilt_update_leaves_weights_moments_and_queue_as_on_a_cpu(synthetic, tmp_path):
    words = [*QUEUE, *CHUNKS, "engine.precision=fp32", "engine.device=auto"]
    states, lines = {}, {}
    for where in ("card", "cpu"):
        folder = tmp_path / where
        run_on(where, words, folder, synthetic, **{SPOILT: "3"})
        (last,) = (folder / "run" / "checkpoints").iterdir()
        kept = load_file(next(last.glob("rank-*.safetensors")))
        states[where] = {name: value for name, value in kept.items() if name[:4] != "rng/"}
        lines[where] = training_lines(folder / "run")
        assert json.loads((last / "state.json").read_text("utf-8"))["state"]["updates"] == 6
    assert states["card"].keys() == states["cpu"].keys()
    for name, value in states["cpu"].items():
        close = 1e-3 * value.double().norm() + 1e-6
        assert (states["card"][name].double() - value.double()).norm() <= close, name
    for card, cpu in zip(lines["card"], lines["cpu"], strict=True):
        assert card["skipped"] == cpu["skipped"] == int(card["step"] >= 3)
        assert card["keys_digest"] == cpu["keys_digest"]
        if card["step"] != 3:
            assert card["loss"] == pytest.approx(cpu["loss"], rel=1e-4)
            assert card["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_weights_that_went_back_meet_the_same_data_as_on_a_cpu(synthetic, tmp_path):
    words = ["train.non_finite={skips: 1}", "checkpoint={every: 2 steps}", "engine.precision=fp32"]
    lines = {}
    for where in ("card", "cpu"):
        run_on(where, words, tmp_path / where, synthetic, **{SPOILT: "4 5"})
        lines[where] = training_lines(tmp_path / where / "run")
    seen = {name: [(x["step"], x["keys_digest"]) for x in lines[name]] for name in lines}
    assert seen["card"] == seen["cpu"]
    assert [step for step, _ in seen["card"]] == [1, 2, 3, 4, 5, 6, 7]
    last = {name: found[-1]["loss"] for name, found in lines.items()}
    assert last["card"] == pytest.approx(last["cpu"], rel=1e-4)


@pytest.mark.slow
def test_a_run_stopped_on_the_card_goes_on_as_if_it_had_not_been(synthetic, tmp_path):
    words = [*QUEUE, "engine.precision=fp32"]
    run_on("card", words, tmp_path / "whole", synthetic)
    run_on("card", words, tmp_path / "parts", synthetic, code=143, **{STOPPED: "3"})
    assert len(training_lines(tmp_path / "parts" / "run")) < 7
    run_on("card", words, tmp_path / "parts", synthetic)
    same = ("step", "samples", "loss", "grad_norm", "logit_scale", "keys_digest")
    whole, parts = (
        [[line[name] for name in same] for line in training_lines(tmp_path / name / "run")]
        for name in ("whole", "parts")
    )
    assert parts == whole
