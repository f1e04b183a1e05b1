"""From the launcher's environment to joined ranks, and how ranks fail together.

Called by `train.py` and the verbs; nothing above this room reads the environment for ranks.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mmscale.contracts import World
from mmscale.errors import LaunchError, MmscaleError

_NOTICE = "mmscale/failure"
_READ = "mmscale/failure-read"
_NOTICE_SECONDS = 5.0

_store: "dist.Store | None" = None


class PeerFailedError(LaunchError):
    """Another rank failed first; carries that rank's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def promised_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world that the launcher promised through the environment.

    Raises:
        LaunchError: A rendezvous address without a world, or numbers that contradict one another.
    """
    names = [("WORLD_SIZE", "RANK", "LOCAL_RANK")]
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in environ:
        names.append(("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"))
    for size_name, rank_name, local_name in names:
        if size_name not in environ:
            continue
        size, rank = int(environ[size_name]), int(environ.get(rank_name, "0"))
        if not 0 <= rank < size:
            raise LaunchError(
                f"{rank_name}={rank} is not below {size_name}={size}; start the ranks with one "
                "launcher"
            )
        local = int(environ.get(local_name, "0"))
        return World(rank, size, local, _launcher(environ))
    if "MASTER_ADDR" in environ:
        raise LaunchError(
            f"MASTER_ADDR={environ['MASTER_ADDR']} promises a world of at least 2 ranks, but "
            "without WORLD_SIZE this process sees a world of 1; start several CPU ranks with "
            "torchrun --nproc_per_node N, or unset MASTER_ADDR"
        )
    return World()


def _launcher(environ: Mapping[str, str]) -> str:
    if "CROSS_RANK" in environ:
        return "deepspeed"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "slurm" if "SLURM_PROCID" in environ else "environment"


def join(world: World, backend: str, timeout_seconds: int, alone_too: bool = False) -> None:
    """Connect the ranks; without a launcher a world of one is connected only if `alone_too`.

    Raises:
        LaunchError: The others could not be reached in time.
    """
    global _store
    if dist.is_initialized():
        return
    if world.launcher == "none":
        if alone_too:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    timeout = timedelta(seconds=timeout_seconds)
    try:
        _store, rank, size = next(
            iter(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
        )
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {world.rank} could not join {world.size} ranks ({str(error).splitlines()[0]}); "
            "check MASTER_ADDR and MASTER_PORT, and that no other job uses the port"
        ) from error


def check_world(world: World, seen: int, engine: str) -> None:
    """Refuse an engine that sees another world than the launcher promised.

    Raises:
        LaunchError: The two numbers differ.
    """
    if seen != world.size:
        raise LaunchError(
            f"the launcher promised {world.size} ranks, {engine} sees {seen}; "
            "start mmscale with deepspeed, torchrun or srun"
        )


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Tell the other ranks of a failure here, and name theirs where it came first.

    After a failure no collective is entered: the connections are closed, which ends the others'
    collectives, and they find the cause in the rendezvous store.
    """
    try:
        yield
    except BaseException as error:
        notice = _publish(world, error)
        _leave_quietly()
        if notice is None or notice["rank"] == world.rank:
            _wait_for_readers(world, mine=notice is not None)
            raise
        _acknowledge()
        if isinstance(error, MmscaleError):
            raise
        raise PeerFailedError(
            f"rank {notice['rank']} failed: {notice['message']}", notice["exit_code"]
        ) from error


def _publish(world: World, error: BaseException) -> dict[str, Any] | None:
    """Post this failure unless one is posted already; return the first."""
    if _store is None or world.size == 1:
        return None
    code = getattr(error, "exit_code", 1)
    if isinstance(error, KeyboardInterrupt):
        code = 130
    text = str(error) if isinstance(error, MmscaleError) else f"{type(error).__name__}: {error}"
    mine = json.dumps({"rank": world.rank, "exit_code": code, "message": text[:2000]})
    try:
        if not isinstance(error, (MmscaleError, KeyboardInterrupt)):
            # Perhaps only the echo of another rank's end: give its notice a moment to arrive.
            with suppress(RuntimeError):
                _store.wait([_NOTICE], timedelta(seconds=1.0))
        first = _store.compare_set(_NOTICE, "", mine)
        return dict(json.loads(first))
    except RuntimeError:
        return None


def _acknowledge() -> None:
    assert _store is not None, "a notice was read from the store"
    with suppress(RuntimeError):
        _store.add(_READ, 1)


def _wait_for_readers(world: World, mine: bool) -> None:
    """The store lives in rank 0: it stays until the others have read the cause, or for seconds."""
    if not mine or _store is None:
        return
    waited = 0.0
    with suppress(RuntimeError):
        while waited < _NOTICE_SECONDS and _store.add(_READ, 0) < world.size - 1:
            time.sleep(0.05)
            waited += 0.05


def _leave_quietly() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def leave() -> None:
    """Part from the other ranks after success; without it an interpreter may abort on exit."""
    global _store
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _store = None
