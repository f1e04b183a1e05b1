"""A worker of a sweep: started by `workers.py` with the sweep's folder."""

import sys
from pathlib import Path

from mmscale.errors import explained
from mmscale.sweep.workers import work


def main() -> int:
    """Take trials until there are none."""
    work(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(explained(main))
