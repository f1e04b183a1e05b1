"""What libraries see of a world that was joined."""

import os

from accelerate import Accelerator

from mmscale.dist.world import join, leave, promised_world
from tests.ranks.launch import run_on_ranks


def _as_srun_starts_it() -> tuple[str, int, int]:
    """The launcher's name, and rank and world as accelerate sees them."""
    for ours, theirs in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
        os.environ[f"SLURM_{theirs}"] = os.environ.pop(ours)
    os.environ["SLURM_STEP_ID"] = "0"
    world = promised_world()
    join(world, "gloo", 60)
    seen = Accelerator(cpu=True)
    found = world.launcher, seen.process_index, seen.num_processes
    leave()
    return found


def test_accelerate_sees_the_ranks_that_srun_started():
    assert run_on_ranks(2, _as_srun_starts_it, join=False) == [("slurm", 0, 2), ("slurm", 1, 2)]
