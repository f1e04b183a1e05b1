"""Real processes for tests: `run_on_ranks(2, fn, *args)` gives each rank's result, rank 0 first."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# How long the other ranks may take to end by themselves once one has failed, so that all are heard.
GRACE_SECONDS = 10.0


class RankError(AssertionError):
    """At least one rank did not return; `reports` holds what each that failed said."""

    def __init__(self, reports: dict[int, str]):
        self.reports = reports
        super().__init__("\n".join(f"--- rank {r}: {text}" for r, text in sorted(reports.items())))


def run_on_ranks(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 180,
    join: bool = True,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `world` new processes that are joined over gloo.

    Args:
        world: Processes to start; 1 starts one, so that code paths are alike.
        fn: A function at the top of a module; it and `args` are pickled.
        args: The same for every rank.
        timeout: Seconds until all processes are killed.
        join: Set up the process group before `fn` and take it down afterwards.
        env: Further environment of the ranks.

    Raises:
        RankError: A rank raised, died or ran out of time.
    """
    # Every rank starts from one process that has imported what ranks need: seconds less for each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.tiny"])
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            rank_env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(env or {}),
            }
            target = (folder, rank, rank_env, join, fn, args)
            processes.append(context.Process(target=_rank_main, args=target, daemon=False))
        try:
            for process in processes:
                process.start()
            late = _wait(processes, timeout)
        finally:
            for process in processes:
                if process.pid is not None and process.is_alive():
                    process.kill()
                    process.join()
        return _collect(Path(folder), processes, late, timeout)


def start_ranks(
    program: str, world: int, address: str = "127.0.0.1"
) -> list[subprocess.Popen[str]]:
    """Start a program for each rank, as a launcher would that does nothing else; rank 0 first.

    Args:
        program: Python code.
        world: Processes to start.
        address: Where they meet.
    """
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]


def free_port() -> int:
    """A TCP port that nobody on this machine listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(processes: list[Any], timeout: float) -> set[int]:
    """Ranks still running at the deadline; a failure shortens it to the grace time."""
    deadline = time.monotonic() + timeout
    failed = False
    while time.monotonic() < deadline:
        if all(process.exitcode is not None for process in processes):
            return set()
        if not failed and any(process.exitcode for process in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    return {rank for rank, process in enumerate(processes) if process.exitcode is None}


def _collect(folder: Path, processes: list[Any], late: set[int], timeout: float) -> list[Any]:
    results, reports = [], {}
    for rank, process in enumerate(processes):
        result, report = folder / f"{rank}.result", folder / f"{rank}.report"
        if report.exists():
            reports[rank] = report.read_text("utf-8")
        elif rank in late:
            reports[rank] = f"killed: still running at its deadline (at most {timeout:g} s)"
        elif process.exitcode or not result.exists():
            reports[rank] = f"ended with {process.exitcode} and no result"
        else:
            results.append(pickle.loads(result.read_bytes()))
    if reports:
        raise RankError(reports)
    return results


def _rank_main(
    folder: str,
    rank: int,
    env: dict[str, str],
    join: bool,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        if join:
            dist.init_process_group("gloo")
        result = pickle.dumps(fn(*args))
        if dist.is_initialized():
            # Nobody leaves while another may still need this rank's connections.
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 -- SystemExit too is told to the parent
        Path(folder, f"{rank}.report").write_text(traceback.format_exc(), "utf-8")
        # Threads of the backend must not turn this into a hang or an abort at exit.
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    Path(folder, f"{rank}.result").write_bytes(result)
    # Same reason.
    os._exit(0)
