"""Seconds and bytes of forward and backward of a loss: ours, open_clip's and the limit.

Rows of width 512 in fp32. The sides take turns, each in a fresh process (or two, as ranks), so that
what disturbs the machine disturbs all of them; medians count.
"""

import statistics
import sys
from pathlib import Path

import torch

from mmscale.config.schema import EngineConfig
from mmscale.errors import ConfigError
from mmscale.parallel.device import choose
from tools.bench.results import Result
from tools.bench.side_process import figures_of

WIDTH = 512
SIZES = {
    1: (1024, 2048, 4096, 8192, 16384, 32768, 65536),
    2: (1024, 4096, 16384),
}
# From here on a turn takes minutes on a CPU.
LARGE = 32768
# Measured: two matrices of logits, and what their softmaxes and gradients add at the peak.
PEER_MATRICES = 4.1
METRICS = ("time_s", "memory_bytes")


def run(
    sizes: dict[int, tuple[int, ...]] | None = None, rounds: int = 3, device: str | None = None
) -> list[Result]:
    """Measure on the CPU, and on the accelerator where there is one.

    Args:
        sizes: Rows of the global batch, by the number of ranks.
        rounds: Turns of each side; large batches take one.
        device: The only one to measure on, `cuda` or `cpu`; None: each that is here.

    Raises:
        ConfigError: This system does not tell a process's peak of memory, or has no such device.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ConfigError("bench loss reads a process's memory from /proc; run it on Linux")
    results = []
    found = choose(EngineConfig.model_validate({"device": device or "auto"})).device.type
    for place in dict.fromkeys((device or "cpu", found)):
        for ranks, batches in (sizes or SIZES).items():
            if place != "cpu" and torch.accelerator.device_count() < ranks:
                continue
            for n in batches:
                sides = ["ours", "limit"] + ["peer"] * peer_fits(n, place)
                turns = 1 if n >= LARGE else rounds
                results += compare(sides, n, ranks, place, turns)
    return results


def peer_fits(n: int, device: str) -> bool:
    """Whether open_clip's loss over `n` rows needs less than half of the memory that is free."""
    return PEER_MATRICES * n * n * 4 < free_bytes(device) / 2


def free_bytes(device: str) -> int:
    """What a new process can allocate."""
    if device != "cpu":
        return torch.accelerator.get_memory_info()[0]
    info = Path("/proc/meminfo").read_text("utf-8")
    return int(info.split("MemAvailable:")[1].split()[0]) * 1024


def compare(sides: list[str], n: int, ranks: int, device: str, turns: int) -> list[Result]:
    """A result for each metric."""
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            figure = measure(side, n, ranks, device)
            figures[side].append(figure)
            seconds, mib = figure["time_s"], figure["memory_bytes"] / 2**20
            where = f"{device}, {ranks} rank{'s' * (ranks > 1)}"
            sys.stderr.write(f"n = {n:,}, {where}: {side} {seconds:.4g} s, {mib:,.0f} MiB\n")
    results = []
    for metric in METRICS:
        medians = {
            side: statistics.median(figure[metric] for figure in figures[side]) for side in sides
        }
        ours, peer = medians["ours"], medians.get("peer")
        # No gradient can take less than its own bytes.
        limit = medians["limit"] if metric == "time_s" else 2.0 * (n // ranks) * WIDTH * 4
        ratio = None if peer is None else ours / peer
        results.append(Result("loss", metric, n, ranks, device, ours, peer, ratio, limit))
    return results


def measure(side: str, n: int, ranks: int, device: str, seconds: float = 1.0) -> dict[str, float]:
    """Median seconds and peak bytes of a side, in processes of its own.

    Raises:
        LaunchError: They failed.
    """
    words = [side, str(n // ranks), str(WIDTH), device, str(seconds)]
    return figures_of("tools.bench.loss_sides", words, ranks)
