"""One side of a comparison in processes of its own, which print their figures as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from mmscale.errors import LaunchError


def figures_of(
    module: str, words: Sequence[str], ranks: int, python_path: str | None = None
) -> dict[str, float]:
    """What a module of ours prints on its last line.

    Args:
        module: Run as a program, alone or by torchrun.
        words: Its arguments; the first names the side.
        ranks: Processes.
        python_path: Folder where they look for packages first.

    Raises:
        LaunchError: They failed.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if python_path is not None:
        paths = [python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    ended = subprocess.run(
        [sys.executable, "-m", *(launcher if ranks > 1 else []), module, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        raise LaunchError(f"{module}: its process for {words[0]} failed: {lines[-1]}")
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures
