"""Cells run: one after another in this process, or each in a process of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from mmscale.errors import MmscaleError, TerminatedError
from mmscale.parallel.signals import StopSignal
from tools.studies.cells import Cell, Figures, Measure, Result

# What a cell in a process of its own leaves in its folder, beside what it wrote to stderr.
FIGURES = "figures.json"
STDERR = "stderr.txt"
_STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.05


def here(cells: Sequence[Cell], out: Path, measure: Measure) -> Generator[Result, None, None]:
    """Results one after another; what a run says goes to `stderr.txt` in its folder."""
    for cell in cells:
        result, unheard = _measured(cell, out / cell.folder, measure)
        yield result
        if unheard:
            signal.raise_signal(signal.SIGTERM)


def in_processes(
    cells: Sequence[Cell], out: Path, measure: Measure, jobs: int
) -> Generator[Result, None, None]:
    """Results as they come, of so many cells at a time."""
    waiting = list(reversed(cells))
    running: dict[subprocess.Popen[str], tuple[Cell, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop()
                running[_start(cell, out / cell.folder, measure, jobs)] = cell, time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                cell, start = running.pop(process)
                yield _ended(cell, out / cell.folder, process, time.monotonic() - start)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _measured(cell: Cell, folder: Path, measure: Measure) -> tuple[Result, bool]:
    """Run a cell in this process; what it says goes to `stderr.txt` in its folder.

    Returns:
        The result, and whether SIGTERM came too late for the run to heed it.

    Raises:
        TerminatedError: SIGTERM came while it ran.
    """
    start = time.monotonic()
    figures: Figures = {}
    error, code = None, 0
    with _fresh(folder).open("w", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        handlers = {number: signal.getsignal(number) for number in _STOPPING}
        try:
            figures = measure(cell, folder)
        except TerminatedError:
            raise
        except MmscaleError as failure:
            error, code = str(failure), failure.exit_code
        except Exception as failure:  # noqa: BLE001 (the others go on)
            traceback.print_exc()
            error, code = f"{type(failure).__name__}: {failure}", 1
        finally:
            # A run listens for signals and never stops to.
            unheard = _noted(signal.getsignal(signal.SIGTERM))
            for number, handler in handlers.items():
                signal.signal(number, handler)
    seconds = time.monotonic() - start
    return Result(cell.labels, cell.words, seconds, figures, error, code), unheard


def _noted(handler: Any) -> bool:
    """Whether a run's handler has taken a signal: after its last update nothing looks at it."""
    listener = getattr(handler, "__self__", None)
    return isinstance(listener, StopSignal) and listener.wanted


def _start(cell: Cell, folder: Path, measure: Measure, jobs: int) -> subprocess.Popen[str]:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with _fresh(folder).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.studies.one_cell"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            text=True,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )
    assert process.stdin is not None, "it was asked for"
    order = {"labels": dict(cell.labels), "words": cell.words, "folder": str(folder)}
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        json.dump({**order, "measure": f"{measure.__module__}:{measure.__qualname__}"}, pipe)
    return process


def _ended(cell: Cell, folder: Path, process: subprocess.Popen[str], seconds: float) -> Result:
    code = process.returncode
    if code == 0:
        figures = json.loads((folder / FIGURES).read_text("utf-8"))
        return Result(cell.labels, cell.words, seconds, figures)
    said = (folder / STDERR).read_text("utf-8", "replace").strip().splitlines() or ["no message"]
    return Result(cell.labels, cell.words, seconds, {}, said[-1].removeprefix("mmscale: "), code)


def _fresh(folder: Path) -> Path:
    """Empty a cell's folder; returns where it writes what it says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder / STDERR
