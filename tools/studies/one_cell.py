"""One cell of a grid in a process of its own: started by `cell_runs.py` with the cell on stdin."""

import importlib
import json
import sys
from pathlib import Path

from mmscale.errors import explained
from mmscale.outputs import replace_file
from tools.studies.cell_runs import FIGURES
from tools.studies.cells import Cell


def main() -> int:
    """Measure; the figures go to a file in the cell's folder."""
    order = json.load(sys.stdin)
    module, _, name = order["measure"].partition(":")
    measure = getattr(importlib.import_module(module), name)
    folder = Path(order["folder"])
    figures = measure(Cell(order["labels"], tuple(order["words"])), folder)
    replace_file(folder / FIGURES, json.dumps(figures).encode())
    return 0


if __name__ == "__main__":
    sys.exit(explained(main))
