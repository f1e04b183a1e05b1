"""What libraries see of a world that was joined."""

import os

import torch
from accelerate import Accelerator

from mmscale.contracts import World
from mmscale.parallel import peers
from mmscale.parallel.peers import broadcast_object, gather_objects, gather_rows
from mmscale.parallel.world import join_ranks, leave, promised_world
from tests.ranks.launch import run_on_ranks


def _as_srun_starts_it() -> tuple[str, int, int]:
    """The launcher's name, and rank and world as accelerate sees them."""
    for ours, theirs in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
        os.environ[f"SLURM_{theirs}"] = os.environ.pop(ours)
    os.environ["SLURM_STEP_ID"] = "0"
    world = promised_world()
    join_ranks(world, "gloo", 60)
    seen = Accelerator(cpu=True)
    found = world.launcher, seen.process_index, seen.num_processes
    leave()
    return found


def test_accelerate_sees_the_ranks_that_srun_started():
    assert run_on_ranks(2, _as_srun_starts_it, join=False) == [
        ("slurm", 0, 2),
        ("slurm", 1, 2),
    ]


def _told() -> tuple[list, dict, list]:
    """What all ranks say, what the main one says, and an empty word of each."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, rank, "test")
    mine = {"rank": rank, "keys": ["a\ud800"] * rank, "rows": torch.arange(1000 * rank)}
    main = {"table": torch.eye(3), "faults": None} if rank == 0 else "nobody asked"
    return gather_objects(world, mine), broadcast_object(world, main), gather_objects(world, "")


def test_ranks_exchange_json_and_tensors_of_any_length():
    for everyone, main, empty in run_on_ranks(3, _told):
        assert [told["rank"] for told in everyone] == [0, 1, 2]
        assert [told["keys"] for told in everyone] == [["a\ud800"] * rank for rank in range(3)]
        for rank, told in enumerate(everyone):
            assert torch.equal(told["rows"], torch.arange(1000 * rank))
        assert torch.equal(main["table"], torch.eye(3))
        assert main["faults"] is None
        assert empty == [""] * 3


def _rows_of(rank: int) -> torch.Tensor:
    return torch.arange(12 * rank).view(3 * rank, 4).float() + 100 * rank


def _rows() -> list[torch.Tensor]:
    """Rows of all ranks in pieces of two, and where no rank has any."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    peers.SENT_AT_ONCE = 40
    world = World(rank, size, rank, "test")
    return [gather_rows(world, _rows_of(rank)), gather_rows(world, torch.empty(0, 4))]


def test_ranks_exchange_rows_of_which_each_has_another_number():
    for found, none in run_on_ranks(3, _rows):
        assert torch.equal(found, torch.cat([_rows_of(rank) for rank in range(3)]))
        assert none.shape == (0, 4)
