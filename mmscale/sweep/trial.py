"""One training of a sweep: a process, watched while it evaluates, stopped where it does not pay."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mmscale
from mmscale.errors import ConfigError, LaunchError, MmscaleError, TerminatedError
from mmscale.parallel.signals import StopSignal
from mmscale.report.metrics import MEAN_RECALL, mean_recall, read_metrics

STDERR = "stderr.txt"
_LOCK = "lock"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120.0
_OF_ITS_VALUES = (2, 3)  # exit codes: a combination that is refused, a training that diverged


class TrialError(MmscaleError):
    """A training failed for a reason that the next one would meet too; carries its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        curve: The metric of each evaluation.
        finished: It came to its end.
        why: Why its values cannot be trained with, or None.
    """

    curve: list[float]
    finished: bool = True
    why: str | None = None


def claim(folder: Path, wait: bool = False) -> int | None:
    """A folder for this process and its children alone; None where another has it.

    The handle is the claim: the system gives the folder back when the last process that holds it
    has ended, however it ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def train_trial(
    words: Sequence[str],
    folder: Path,
    claimed: int,
    metric: str,
    goes_on: Callable[[list[float]], bool],
    stop: StopSignal,
) -> Outcome:
    """Train in `folder`, from where an earlier attempt stopped.

    Args:
        words: The trial's configuration.
        folder: The run's.
        claimed: What `claim` gave; the training holds it too.
        metric: The figure of the evaluations.
        goes_on: Takes the values so far after each evaluation; False ends the training.
        stop: Ends the training with a checkpoint.

    Raises:
        TerminatedError: Told to stop.
        TrialError: The training failed, and not because of its values.
    """
    command = [sys.executable, str(Path(mmscale.__file__).with_name("train.py")), *words]
    with (folder / STDERR).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, f"run.dir={folder}", "run.resume=auto"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[claimed],
        )
    ended = False
    try:
        seen = 0
        while process.poll() is None and not ended:
            if stop.wanted:
                raise TerminatedError("told to stop; started again, the sweep goes on")
            curve = values(folder, metric)
            ended = len(curve) > seen and not goes_on(curve)
            seen = max(seen, len(curve))
            time.sleep(_POLL_SECONDS)
    finally:
        _end(process)
    curve, code = values(folder, metric), process.returncode
    # A run that has made its last update does not listen any more, and is whole.
    if code == 0 or ended:
        return Outcome(curve, finished=code == 0)
    said = (folder / STDERR).read_text("utf-8", "replace").strip().splitlines() or ["no message"]
    why = said[-1].removeprefix("mmscale: ")
    if code in _OF_ITS_VALUES:
        return Outcome(curve, finished=False, why=why)
    raise TrialError(f"{folder}: {why}", code if code > 0 else LaunchError.exit_code)


def values(folder: Path, metric: str) -> list[float]:
    """The metric of every evaluation so far, in their order.

    Raises:
        ConfigError: An evaluation does not hold it.
    """
    log = folder / "metrics.jsonl"
    lines = read_metrics(log) if log.exists() else []
    evaluations = {
        line["step"]: {**line, MEAN_RECALL: mean_recall(line)}
        for line in lines
        if not line.get("finished") and any(key.startswith("eval/") for key in line)
    }
    for line in evaluations.values():
        if not isinstance(line.get(metric), (int, float)):
            known = ", ".join(key for key in line if key.startswith("eval/"))
            raise ConfigError(f"metric={metric} is no figure of an evaluation; choose of {known}")
    return [float(evaluations[step][metric]) for step in sorted(evaluations)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a training write its checkpoint, and be sure that it is gone."""
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
