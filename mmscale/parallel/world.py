"""From the launcher's environment to joined ranks.

Called by `train.py` and the verbs; nothing above this room reads the environment for ranks.
"""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from mmscale.contracts import World
from mmscale.errors import LaunchError, gist
from mmscale.parallel.failure import stop_watching, watch

_AFTER_WATCHDOG = 30


def promised_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world that the launcher promised through the environment.

    Raises:
        LaunchError: A rendezvous address without a world, or numbers that contradict one another.
    """
    names = [("WORLD_SIZE", "RANK", "LOCAL_RANK")]
    if _number(environ, "SLURM_NTASKS", 1) > 1 and "SLURM_STEP_ID" in environ:
        names.append(("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"))
    for size_name, rank_name, local_name in names:
        if size_name not in environ:
            continue
        size, rank = _number(environ, size_name, 1), _number(environ, rank_name, 0)
        if not 0 <= rank < size:
            raise LaunchError(
                f"{rank_name}={rank} is not below {size_name}={size}; start the ranks with one "
                "launcher"
            )
        launcher = _launcher(environ)
        local_rank = _number(environ, local_name, 0)
        if launcher in ("slurm", "environment") and _shows_one_device(environ):
            local_rank = 0
        return World(rank, size, local_rank, launcher)
    if "MASTER_ADDR" in environ:
        raise LaunchError(
            f"MASTER_ADDR={environ['MASTER_ADDR']} promises a world of at least 2 ranks, but "
            "without WORLD_SIZE this process sees a world of 1; start several CPU ranks with "
            "torchrun --nproc_per_node N, or unset MASTER_ADDR"
        )
    return World()


def local_ranks(world: World, environ: Mapping[str, str] = os.environ) -> int:
    """Ranks of this world on this machine; all of them where the launcher does not say."""
    return _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", world.size))


def rank_cores(world: World, environ: Mapping[str, str] = os.environ) -> int:
    """Cores that a rank has for itself: its task's, or its share of those this process may use."""
    if world.launcher == "slurm" and "SLURM_CPUS_PER_TASK" in environ:
        return _number(environ, "SLURM_CPUS_PER_TASK", 1)
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(1, cores // local_ranks(world, environ))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal():
        raise LaunchError(f"{name}={value} is not a number; start the ranks with a launcher")
    return int(value)


def _shows_one_device(environ: Mapping[str, str]) -> bool:
    """Whether this process has a device of its own, as under `srun --gpus-per-task=1`."""
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(shown) and "," not in shown


def _launcher(environ: Mapping[str, str]) -> str:
    if "CROSS_RANK" in environ:
        return "deepspeed"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "slurm" if "SLURM_PROCID" in environ else "environment"


def join_ranks(world: World, backend: str, timeout_seconds: int, alone_too: bool = False) -> None:
    """Connect the ranks; without a launcher a world of one is connected only if `alone_too`.

    Raises:
        LaunchError: The others could not be reached in time.
    """
    if dist.is_initialized():
        return
    if world.launcher == "none":
        if alone_too:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            # DeepSpeed does not start without it.
            os.environ["LOCAL_RANK"] = "0"
        return
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, size = next(
            iter(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
        )
        # Later than the watchdog, who can tell why an exchange does not come to its end.
        patience = timeout + timedelta(seconds=_AFTER_WATCHDOG)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        # accelerate looks for the world under torchrun's names, which srun does not set.
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ["LOCAL_RANK"] = str(world.local_rank)
        watch(store, rank, size)
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {world.rank} could not join {world.size} ranks ({gist(error)}); "
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


def leave() -> None:
    """Part from the other ranks after success; without it an interpreter may abort on exit."""
    stop_watching()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
