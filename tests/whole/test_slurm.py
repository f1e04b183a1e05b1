"""The sbatch scripts on a real Slurm: what stops a job loses no step and repeats none."""

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.whole.slurm_jobs import Cluster, cluster, why_not
from tests.whole.small_run import (
    ALONE,
    SETTINGS,
    course,
    metrics,
    succeed,
    training_lines,
    words_for,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--time=10")
ZERO_2 = "engine.deepspeed=ds_configs/zero2.json"
ENDLESS = "1000000 steps"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Job:
    """The small run on two nodes, without an end until `end_after` says how long it is."""

    def __init__(self, slurm: Cluster, folder: Path, pairs, *words: str):
        self.slurm, self.run_dir = slurm, folder / "run"
        self._settings = folder / "small.yaml"
        self._write(ENDLESS)
        self.words = [*words_for(pairs, self._settings), f"run.dir={self.run_dir}", *words]

    def _write(self, duration: str) -> None:
        self._settings.write_text(SETTINGS.replace("20 steps", duration), "utf-8")

    def submit(self, *options: str) -> str:
        return self.slurm.submit("train.sbatch", *self.words, options=(*TWO_NODES, *options))

    def steps(self) -> int:
        log = self.run_dir / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def interrupt(self, job: str, act: Callable[[], object]) -> int:
        """Act on the job once it has made some steps; the next start of it then ends.

        Returns the number of the last step before.
        """
        self.slurm.wait(job, lambda: self.steps() >= 12, "has not trained")
        act()
        self.slurm.wait(job, lambda: self.slurm.state(job) == "PENDING", "was not queued again")
        last = training_lines(self.run_dir)[-1]["step"]
        self._write(f"{last + 7} steps")
        return last


@pytest.fixture
def job(slurm, tmp_path, synthetic):
    return lambda *words: Job(slurm, tmp_path, synthetic, *words)


@pytest.fixture(scope="module")
def uninterrupted(synthetic, tmp_path_factory):
    """Loss and digest by step of the run that nothing stopped, on one device, as far as asked."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = folder / "small.yaml"

    @cache
    def as_far_as(steps: int) -> dict[int, tuple[float, str]]:
        settings.write_text(SETTINGS.replace("20 steps", f"{steps} steps"), "utf-8")
        run_dir = folder / f"{steps}"
        succeed([*ALONE, *words_for(synthetic, settings), f"run.dir={run_dir}"], timeout=300)
        return course(run_dir)

    return as_far_as


def _assert_nothing_lost_or_repeated(run_dir: Path, uninterrupted, steps: int) -> None:
    lines = training_lines(run_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    wanted = uninterrupted(steps)
    assert {line["step"]: line["keys_digest"] for line in lines} == {
        step: digest for step, (_, digest) in wanted.items()
    }
    assert metrics(run_dir)[-1]["finished"]


@pytest.mark.parametrize("engine", ["accelerate", "zero"])
def test_two_nodes_train_as_one_device_does(slurm, job, uninterrupted, engine):
    ours = job(*([ZERO_2] if engine == "zero" else []))
    ours._write("20 steps")
    number = ours.submit()
    slurm.finish(number)
    _assert_nothing_lost_or_repeated(ours.run_dir, uninterrupted, 20)
    for step, (loss, _) in uninterrupted(20).items():
        assert course(ours.run_dir)[step][0] == pytest.approx(loss, rel=1e-4)
    assert list(slurm.rank_logs(number)) == ["rank-0.log", "rank-1.log"]
    assert "2 ranks x 8 rows" in slurm.rank_logs(number)["rank-0.log"].read_text("utf-8")


def test_a_requeued_job_goes_on_with_the_next_step(slurm, job, uninterrupted):
    ours = job()
    number = ours.submit()
    last = ours.interrupt(number, lambda: slurm.ask("scontrol", "requeue", number))
    slurm.finish(number)
    assert slurm.restarts(number) == 1
    _assert_nothing_lost_or_repeated(ours.run_dir, uninterrupted, last + 7)
    # Slurm asked the ranks to end first, and they wrote what they had.
    assert slurm.resumed(number) == [last]


def test_a_job_that_runs_out_of_time_writes_a_checkpoint_and_queues_itself(
    slurm, job, uninterrupted
):
    ours = job(ZERO_2)
    # Slurm looks at its clocks every 30 s, so the signal comes 30 to 60 s after the start.
    number = ours.submit("--time=2", "--signal=USR1@60")
    last = ours.interrupt(number, lambda: None)
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    slurm.finish(number)
    assert slurm.restarts(number) >= 1
    assert slurm.resumed(number)[-1] == last
    assert "out of time with a checkpoint written" in slurm.logs(number)
    _assert_nothing_lost_or_repeated(ours.run_dir, uninterrupted, last + 7)


def test_a_job_one_of_whose_ranks_is_killed_goes_on_from_its_last_checkpoint(
    slurm, job, uninterrupted
):
    ours = job(ZERO_2)
    number = ours.submit()
    last = ours.interrupt(number, lambda: os.kill(_pid(number, rank=1), signal.SIGKILL))
    slurm.finish(number)
    (resumed,) = slurm.resumed(number)
    assert resumed == last - last % 10 or resumed == last - last % 10 - 10, "of the last two saves"
    assert "a rank was killed" in slurm.logs(number)
    assert "rank 1 ended without a word" in slurm.rank_logs(number)["rank-0.log"].read_text("utf-8")
    _assert_nothing_lost_or_repeated(ours.run_dir, uninterrupted, last + 7)


def test_a_job_that_can_never_run_is_not_queued_again(slurm, job):
    ours = job("optim.lr=fast")
    number = ours.submit()
    slurm.finish(number, "FAILED")
    assert slurm.restarts(number) == 0
    assert "optim.lr='fast' must be a number" in slurm.logs(number)


def test_a_finished_run_is_evaluated_by_a_job(slurm, synthetic, tmp_path):
    settings = tmp_path / "small.yaml"
    settings.write_text(SETTINGS, "utf-8")
    run_dir, figures = tmp_path / "run", tmp_path / "figures.json"
    succeed([*ALONE, *words_for(synthetic, settings), f"run.dir={run_dir}"])
    words = (run_dir, "--data", synthetic.test, "--json", figures)
    slurm.finish(slurm.submit("eval.sbatch", *words, options=("--time=10",)))
    found = json.loads(figures.read_text("utf-8"))
    assert found["images"] == 24
    here = succeed(["mmscale", "eval", *words[:-1], tmp_path / "here.json"])
    assert "i2t_r1" in here.stdout
    assert json.loads((tmp_path / "here.json").read_text("utf-8")) == found


def test_an_array_packs_what_one_process_packs(slurm, synthetic, tmp_path):
    words = (synthetic.source, "--out", tmp_path / "packed", "--samples-per-shard", "32")
    slurm.finish(slurm.submit("pack.sbatch", *words, options=("--array=1-2", "--time=10")))
    for split in ("train", "val", "test"):
        ours, theirs = tmp_path / "packed" / split, synthetic.packed / split
        wanted = {path.name: path.read_bytes() for path in theirs.glob("*.tar")}
        assert {path.name: path.read_bytes() for path in ours.glob("*.tar")} == wanted
        assert (ours / "manifest.json").read_bytes() == (theirs / "manifest.json").read_bytes()


def test_an_array_with_a_gap_is_refused(slurm, synthetic, tmp_path):
    words = (synthetic.source, "--out", tmp_path / "packed")
    number = slurm.submit("pack.sbatch", *words, options=("--array=1,3", "--time=10"))
    slurm.finish(number, "FAILED")
    assert "an array with gaps" in slurm.logs(number)
    assert not (tmp_path / "packed").exists()


def test_the_tasks_of_an_array_share_a_sweep(slurm, synthetic, tmp_path):
    pytest.importorskip("optuna")
    settings, space = tmp_path / "small.yaml", tmp_path / "space.yaml"
    settings.write_text(SETTINGS.replace("20 steps", "4 steps"), "utf-8")
    rates = {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}
    search = {"base": words_for(synthetic, settings), "parameters": {"optim.lr": rates}}
    space.write_text(json.dumps({**search, "trials": 3}), "utf-8")
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    words = (space, "--out", out, "--json", figures)
    slurm.finish(slurm.submit("sweep.sbatch", *words, options=("--array=1-2", "--time=10")))
    trials = json.loads(figures.read_text("utf-8"))["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert len(list((out / "trials").glob("*/metrics.jsonl"))) == 3
    assert (out / "sweep.html").exists()


def _pid(job: str, rank: int) -> int:
    """The process of a rank, which is on this machine like its node."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            lines = set(environ.read_bytes().decode("utf-8", "replace").split("\0"))
            words = (environ.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        trains = len(words) > 1 and words[1].endswith(b"mmscale/train.py")
        if trains and {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"} <= lines:
            return int(environ.parent.name)
    raise AssertionError(f"job {job} has no rank {rank}")
