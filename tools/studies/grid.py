"""Grids of runs: what has no result yet is run, and its result added to the grid's file."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from mmscale.errors import TerminatedError, printable
from tools.studies.cell_runs import here, in_processes
from tools.studies.cells import RESULTS, Cell, Measure, Result, Results


def run_grid(cells: Sequence[Cell], out: Path, measure: Measure, jobs: int = 0) -> list[Result]:
    """The result of each cell, in their order; cells that failed before are run again.

    Args:
        cells: The grid.
        out: Holds `results.jsonl`, and a folder a cell.
        measure: Runs a cell in its folder; a function of a module, where `jobs` is not 0.
        jobs: Processes at once, a new one a cell; 0 runs them in this process one after another,
            which spares them the imports.

    Raises:
        TerminatedError: SIGTERM came; results so far are in the file.
    """
    names = [cell.folder for cell in cells]
    assert len(set(names)) == len(names), "labels tell the cells of a grid apart"
    results = Results(out / RESULTS)
    left = [cell for cell in cells if not results.succeeded(cell)]
    ended = len(cells) - len(left)
    started = time.monotonic()
    ways = in_processes(left, out, measure, jobs) if jobs else here(left, out, measure)
    with _ended_by_sigterm(), contextlib.closing(ways), contextlib.closing(results):
        for count, result in enumerate(ways, start=1):
            results.add(result)
            seconds = (time.monotonic() - started) / count * (len(left) - count)
            _tell(result, f"{ended + count}/{len(cells)}", seconds)
    return [results.of(cell) for cell in cells]


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TerminatedError("told to stop; started again, the grid goes on with what is left")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(result: Result, place: str, left: float) -> None:
    line = f"{place}  {result.cell}  {result.seconds:.1f} s"
    if result.error is not None:
        line += f"  failed with exit code {result.exit_code}: {result.error}"
    sys.stderr.write(printable(f"{line}  ({left:.0f} s left)\n"))
    sys.stderr.flush()
