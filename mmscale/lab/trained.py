"""A cell that is a training run: in this process, without a launcher."""

import shutil
from pathlib import Path
from typing import Any

from mmscale.config.load import load_config
from mmscale.lab.cells import Cell, Figures
from mmscale.report.metrics import read_metrics
from mmscale.train import run

RECALLS = tuple(f"eval/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
MEAN_RECALL = "eval/mean"


def trained(cell: Cell, folder: Path) -> Figures:
    """Train; the last value of every figure in the run's log, and the mean of the six recalls.

    The run's checkpoints are removed: a grid would fill the disk.
    """
    run(load_config([*cell.words, *folder_words(folder)]))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return last_figures(folder)


def folder_words(folder: Path) -> tuple[str, ...]:
    """The words of a run that starts afresh in a folder."""
    return f"run.dir={folder}", "run.resume=never", "run.overwrite=true"


def last_figures(folder: Path) -> Figures:
    """The last value of every figure in a run's log."""
    figures: dict[str, Any] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        figures |= line
    figures.pop("finished", None)
    if all(name in figures for name in RECALLS):
        figures[MEAN_RECALL] = sum(figures[name] for name in RECALLS) / len(RECALLS)
    return figures
