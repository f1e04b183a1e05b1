"""One training update: ours and open_clip's own `train_one_epoch`.

The same towers of OpenCLIP with random weights, the same rows, fp32, AdamW, clipping at 1. The
sides take turns, each in a fresh process (or two, as ranks); medians count.
"""

import statistics
import sys
from pathlib import Path

from mmscale.errors import ConfigError
from tools.bench.results import Result, peers_folder
from tools.bench.side_process import figures_of
from tools.bench.step_sides import CONTEXT

SIDES = ("ours", "peer")
METRICS = ("time_s", "memory_bytes")
ROWS = 64
# Tokens of the longest caption, and chunks that a rank's rows are cut into.
CASES = {
    "step, captions of 77 tokens": (CONTEXT, 1),
    "step, captions of 24 tokens": (24, 1),
    "step, 4 chunks": (CONTEXT, 4),
}


def run(rows: int = ROWS, steps: int = 6, rounds: int = 3) -> list[Result]:
    """Measure on the CPU: about ten minutes.

    Args:
        rows: Of the global batch.
        steps: Updates of a turn.
        rounds: Turns of each side.

    Raises:
        ConfigError: This system does not tell a process's peak of memory.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ConfigError("bench step reads a process's memory from /proc; run it on Linux")
    results = []
    for ranks in (1, 2):
        for name, (tokens, chunks) in CASES.items():
            results += compare(name, rows, tokens, chunks, ranks, steps, rounds)
    return results


def compare(
    name: str, rows: int, tokens: int, chunks: int, ranks: int, steps: int, rounds: int
) -> list[Result]:
    """A result for each metric."""
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            words = [side, *map(str, (rows // ranks, tokens, chunks, steps))]
            found = figures_of("tools.bench.step_sides", words, ranks, str(peers_folder()))
            figures[side].append(found)
            seconds, mib = found["time_s"], found["memory_bytes"] / 2**20
            sys.stderr.write(
                f"{name}, {ranks} ranks: {side} {seconds:.4g} s, {mib:,.0f} MiB, "
                f"{found['parameters']:,.0f} parameters\n"
            )
    results = []
    for metric in METRICS:
        ours, peer = (statistics.median(f[metric] for f in figures[side]) for side in SIDES)
        results.append(Result(name, metric, rows, ranks, "cpu", ours, peer, ours / peer, None))
    return results
