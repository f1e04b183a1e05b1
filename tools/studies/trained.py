"""A cell that is a training run: in this process, without a launcher."""

import shutil
from pathlib import Path
from typing import Any

from mmscale.config.load import load_config
from mmscale.report.metrics import MEAN_RECALL, mean_recall, read_metrics
from mmscale.train import run
from tools.studies.cells import Cell, Figures


def trained(cell: Cell, folder: Path) -> Figures:
    """Train; the last value of every figure in the run's log, and the mean of the six recalls.

    The run's checkpoints are removed, because a grid would fill the disk; its page is not drawn.
    """
    run(load_config([*cell.words, *folder_words(folder)]))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return last_figures(folder)


def folder_words(folder: Path) -> tuple[str, ...]:
    """The words of a run that starts afresh in a folder, for its figures alone."""
    return f"run.dir={folder}", "run.resume=never", "run.overwrite=true", "log.page=false"


def last_figures(folder: Path) -> Figures:
    """The last value of every figure in a run's log."""
    figures: dict[str, Any] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        figures |= line
    figures.pop("finished", None)
    if (mean := mean_recall(figures)) is not None:
        figures[MEAN_RECALL] = mean
    return figures
