"""A study is a grid of runs and a page of what came of them.

Each is a module beside this one with `cells(words, seeds) -> list[Cell]`, `page(results)
-> str` (Markdown) and, where a cell is no plain training run, `measure(cell, folder) -> Figures`.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmscale.errors import ConfigError
from mmscale.outputs import replace_file
from tools.studies.cells import Cell, Result
from tools.studies.grid import run_grid
from tools.studies.trained import trained

STUDIES = ("collapse", "losses", "parity", "recipe")
PAGE = "page.md"


def run(
    name: str, words: Sequence[str], out: Path, seeds: int, jobs: int, only: Sequence[str] = ()
) -> tuple[list[Result], str]:
    """Run what is left of a study's grid; every result, and the page.

    Args:
        name: Of the study.
        words: Presets, files and `key=value` words that all its runs share.
        out: Its folder: `results.jsonl`, `page.md`, and a folder a run.
        seeds: Runs of each place, with seeds 0, 1, ...
        jobs: Processes at once; 0 runs everything in this one.
        only: `label=value` words that a cell must have, one of those for each label.

    Raises:
        ConfigError: There is no such study, or no such cell.
    """
    if name not in STUDIES:
        raise ConfigError(f"study {name}: there is no such study; choose of {', '.join(STUDIES)}")
    module: Any = importlib.import_module(f"tools.studies.{name}")
    cells = chosen(module.cells(tuple(words), range(seeds)), only)
    results = run_grid(cells, out, getattr(module, "measure", trained), jobs)
    page: str = module.page(results)
    replace_file(out / PAGE, page.encode())
    return results, page


def chosen(cells: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that have a wanted value for each label that is named.

    Raises:
        ConfigError: None has.
    """
    wanted: dict[str, set[str]] = {}
    for word in only:
        label, _, value = word.partition("=")
        wanted.setdefault(label, set()).add(value)
    left = [
        cell
        for cell in cells
        if all(str(cell.labels.get(label)) in values for label, values in wanted.items())
    ]
    if not left:
        values = {label: {str(cell.labels[label]) for cell in cells} for label in cells[0].labels}
        known = "; ".join(f"{label}: {', '.join(sorted(all_))}" for label, all_ in values.items())
        raise ConfigError(f"--only {' --only '.join(only)}: no such cell; labels are {known}")
    return left


def with_defaults(words: Sequence[str], defaults: Sequence[str]) -> tuple[str, ...]:
    """A study's own settings after presets and files, before the words of its user."""
    first = next((place for place, word in enumerate(words) if "=" in word), len(words))
    return (*words[:first], *defaults, *words[first:])
