"""The grid runner: a line a result, resumed, failures beside successes, one process or many."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mmscale.errors import ConfigError, DataError, TerminatedError
from mmscale.parallel.signals import StopSignal
from tools.studies.cells import RESULTS, Cell, Results
from tools.studies.experiments import chosen, with_defaults
from tools.studies.grid import run_grid

CELLS = [
    Cell({"loss": loss, "seed": seed}, (f"loss={loss}", f"seed={seed}"))
    for loss in ("clip", "broken", "wrong")
    for seed in (0, 1)
]


def measured(cell, folder):
    """Stands for a run: says something, counts its calls, and fails where its label says so."""
    sys.stderr.write(f"running {cell}\n")
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{cell}\n")
    if cell.labels["loss"] == "wrong":
        raise ConfigError("seed: wrong as it is")
    if cell.labels["loss"] == "broken":
        raise KeyError("a bug")
    return {"recall": 10.5 + cell.labels["seed"], "process": os.getpid()}


def killed(cell, folder):
    """A run whose process ends without a word, as one does that ran out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def asleep(cell, folder):
    (folder.parent / "asleep").touch()
    time.sleep(60)


def terminated(cell, folder):
    if cell.labels["seed"] == 1:
        raise TerminatedError("told to stop")
    return {}


def unheeding(cell, folder):
    """A run that is told to stop while it writes its last files."""
    StopSignal()
    signal.raise_signal(signal.SIGTERM)
    return {}


def calls(out):
    return (out / "calls").read_text().splitlines()


def lines(out):
    return [json.loads(line) for line in (out / RESULTS).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("jobs", [0, 2])
def test_every_cell_gets_its_line_and_a_failed_one_its_error(tmp_path, capsys, jobs):
    results = run_grid(CELLS, tmp_path, measured, jobs)
    assert [result.cell for result in results] == CELLS
    assert [result.exit_code for result in results] == [0, 0, 1, 1, 2, 2]
    assert [result.figures.get("recall") for result in results] == [10.5, 11.5, *[None] * 4]
    assert "a bug" in results[2].error
    assert results[4].error == "seed: wrong as it is"
    here = [result.figures["process"] == os.getpid() for result in results[:2]]
    assert here == [jobs == 0] * 2
    assert sorted(line["words"] for line in lines(tmp_path)) == sorted(list(c.words) for c in CELLS)
    said = tmp_path / CELLS[2].folder / "stderr.txt"
    assert "running loss=broken seed=0" in said.read_text()
    assert "Traceback" in said.read_text()
    told = capsys.readouterr().err
    assert told.count("\n") == len(CELLS), "progress alone: what runs say goes to their folders"
    assert "6/6" in told
    assert "failed with exit code 2: seed: wrong as it is" in told


def test_started_again_it_runs_what_is_left(tmp_path):
    run_grid(CELLS[:1], tmp_path, measured)
    again = run_grid(CELLS, tmp_path, measured)
    assert [result.figures.get("recall") for result in again[:2]] == [10.5, 11.5]
    assert calls(tmp_path).count(str(CELLS[0])) == 1
    run_grid(CELLS, tmp_path, measured)
    assert calls(tmp_path).count(str(CELLS[1])) == 1
    assert calls(tmp_path).count(str(CELLS[2])) == 2, "a failed one is tried again"


def test_other_words_are_another_run(tmp_path):
    run_grid(CELLS[:1], tmp_path, measured)
    changed = Cell(CELLS[0].labels, (*CELLS[0].words, "train.duration=9 steps"))
    assert run_grid([changed], tmp_path, measured)[0].words == changed.words
    assert len(calls(tmp_path)) == 2


def test_a_torn_last_line_is_dropped_and_its_cell_run_again(tmp_path):
    run_grid(CELLS[:2], tmp_path, measured)
    path = tmp_path / RESULTS
    path.write_bytes(path.read_bytes()[:-9])
    results = run_grid(CELLS[:2], tmp_path, measured)
    assert [result.figures["recall"] for result in results] == [10.5, 11.5]
    assert calls(tmp_path) == [str(CELLS[0]), str(CELLS[1]), str(CELLS[1])]
    assert len(lines(tmp_path)) == 2


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / RESULTS).write_text("no result\n" * 2)
    with pytest.raises(DataError, match="line 1"):
        Results(tmp_path / RESULTS)


def test_a_killed_process_is_a_failed_cell(tmp_path):
    results = run_grid(CELLS[:2], tmp_path, killed, jobs=1)
    assert [result.exit_code for result in results] == [-signal.SIGKILL] * 2


def test_a_run_told_to_stop_ends_the_grid(tmp_path):
    with pytest.raises(TerminatedError):
        run_grid(CELLS[:2], tmp_path, terminated)
    assert [line["labels"]["seed"] for line in lines(tmp_path)] == [0]


def test_a_signal_that_a_run_did_not_heed_ends_the_grid_after_it(tmp_path):
    with pytest.raises(TerminatedError):
        run_grid(CELLS[:2], tmp_path, unheeding)
    assert [line["labels"]["seed"] for line in lines(tmp_path)] == [0]


def test_sigterm_ends_the_grid_and_the_processes_of_its_cells(tmp_path):
    program = (
        "from pathlib import Path; from mmscale.errors import explained\n"
        "from tools.studies.grid import run_grid\n"
        "from tests.tools.test_grid import CELLS, asleep\n"
        "import sys\n"
        f"sys.exit(explained(lambda: len(run_grid(CELLS, Path({str(tmp_path)!r}), asleep, 1))))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "asleep").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 143
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_signal_handlers_are_as_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    run_grid(CELLS[:1], tmp_path, measured)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_cells_are_chosen_by_their_labels():
    assert chosen(CELLS, ["seed=1", "loss=clip", "loss=wrong"]) == [CELLS[1], CELLS[5]]
    assert chosen(CELLS, []) == CELLS
    with pytest.raises(ConfigError, match="loss: broken, clip, wrong"):
        chosen(CELLS, ["loss=clap"])


def test_an_experiments_settings_come_before_its_users():
    words = ("flickr8k", "more.yaml", "data.train=here")
    assert with_defaults(words, ["eval.every=null"]) == (*words[:2], "eval.every=null", words[2])
    assert with_defaults(("flickr8k",), ["a=b"]) == ("flickr8k", "a=b")
