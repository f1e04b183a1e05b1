"""`mmscale sweep SPACE.yaml`: trainings with other settings each, to find the best of a metric.

A worker is a process of this module that takes trials from the sweep's journal until there are
none. The same command on another machine adds workers to the same folder.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmscale.config.load import flatten
from mmscale.errors import ConfigError, HaltError, TerminatedError, explained, printable
from mmscale.outputs import replace_file
from mmscale.parallel.signals import StopSignal
from mmscale.sweep.space import Space, read_search_space
from mmscale.sweep.study import Attempt, Study, Trial, require_optuna, trial_folder
from mmscale.sweep.trial import train_trial

SPACE = "space.yaml"
MAY_DIFFER = ("trials", "pruning")
_POLL_SECONDS = 0.2


def prepare(space_path: Path, out: Path) -> Space:
    """Read a search and keep it beside its journal, where workers find it.

    Raises:
        ConfigError: The search is wrong, or `out` holds another one.
    """
    require_optuna()
    space, kept = read_search_space(space_path), out / SPACE
    if kept.exists():
        before, now = flatten(read_search_space(kept)), flatten(space)
        faults = [
            f"{space_path}: {key}={now.get(key)} differs from the {before.get(key)} that {out} was "
            "begun with; put it back, or name another folder with --out"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key) and not key.startswith(MAY_DIFFER)
        ]
        if faults:
            raise ConfigError("\n".join(faults))
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(space.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_file(kept, text.encode())
    return space


def run_workers(out: Path, workers: int) -> int:
    """Run workers until no trial is left to take; returns the exit code of the first that failed.

    Args:
        out: The sweep's folder.
        workers: Trainings at once; on a machine with GPUs each has the next one.

    Raises:
        TerminatedError: Told to stop; so were the trainings.
    """
    stop = StopSignal()
    processes = [_start(out, place, workers) for place in range(workers)]
    try:
        while any(process.poll() is None for process in processes):
            if stop.wanted:
                raise TerminatedError("told to stop; started again, the sweep goes on")
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait() for process in processes]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def trials_of(space: Space, out: Path) -> list[Trial]:
    """Every trial so far.

    Raises:
        HaltError: None came to a value.
    """
    trials = Study(space, out).trials()
    if not any(trial.value is not None for trial in trials):
        why = next((trial.why for trial in trials if trial.why), "all are with other workers")
        raise HaltError(f"{out}: no trial came to a value; {why}")
    return trials


def work(out: Path) -> int:
    """Take trials until there are none: what a worker does; returns its exit code.

    Raises:
        TerminatedError: SIGTERM came; the training in hand has written a checkpoint.
    """
    stop = StopSignal()
    space = read_search_space(out / SPACE)
    study = Study(space, out)
    while (attempt := study.next()) is not None:
        with contextlib.closing(attempt):
            outcome = train_trial(
                space.words(attempt.values),
                attempt.folder,
                attempt.handle,
                space.metric,
                attempt.goes_on,
                stop,
            )
            attempt.end(outcome)
        trials = study.trials()
        _tell(space, attempt, trials)
        _drop_checkpoints(out, space, trials)
    return 0


def best(space: Space, trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the best value."""
    found = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    choose = max if space.direction == "maximize" else min
    return choose(found, key=lambda trial: trial.value or 0.0, default=None)


def sweep_json(space: Space, trials: Sequence[Trial]) -> dict[str, Any]:
    """A sweep as `--json` writes it."""
    top = best(space, trials)
    return {
        "metric": space.metric,
        "direction": space.direction,
        "best": top.number if top else None,
        "words": list(space.words(top.parameters)) if top else None,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state,
                "value": trial.value,
                "parameters": dict(trial.parameters),
                "evaluations": list(trial.curve),
                "why": trial.why,
            }
            for trial in trials
        ],
    }


def _start(out: Path, place: int, workers: int) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    env = {"OMP_NUM_THREADS": threads, **os.environ}
    if workers > 1 and (gpus := _num_gpus()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % gpus]
    return subprocess.Popen([sys.executable, "-m", "mmscale.sweep.workers", str(out)], env=env)


def _num_gpus() -> int:
    # A worker needs no torch.
    from mmscale.parallel.device import this_machine

    return len(this_machine().gpus)


def _drop_checkpoints(out: Path, space: Space, trials: Sequence[Trial]) -> None:
    """Only the best trial's stay: a sweep would fill the disk."""
    top = best(space, trials)
    for trial in trials:
        if trial.state != "running" and trial is not top:
            checkpoints = trial_folder(out, trial.number) / "checkpoints"
            shutil.rmtree(checkpoints, ignore_errors=True)


def _tell(space: Space, attempt: Attempt, trials: Sequence[Trial]) -> None:
    trial, top = trials[attempt.number], best(space, trials)
    value = "no value" if trial.value is None else f"{space.metric} {trial.value:.4g}"
    tried = " ".join(f"{name}={value}" for name, value in trial.parameters.items())
    line = f"trial {trial.number + 1}/{space.trials} {trial.state}: {value}  {tried}"
    if top is not None:
        line += f"  (best {top.value:.4g}, trial {top.number + 1})"
    sys.stderr.write(printable(f"{line}\n"))


if __name__ == "__main__":
    sys.exit(explained(lambda: work(Path(sys.argv[1]))))
