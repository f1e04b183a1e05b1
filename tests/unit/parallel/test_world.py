"""The world that a launcher's environment promises, by the environment alone."""

import pytest

from mmscale.parallel.world import promised_world

SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
    "MASTER_ADDR": "node-0",
}
BY_HAND = {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "3", "MASTER_ADDR": "node-0"}


@pytest.mark.parametrize("launched", [SLURM, BY_HAND])
@pytest.mark.parametrize(
    ("shown", "local_rank"),
    [("2", 0), ("GPU-4f7a", 0), ("0,1,2,3", 3), ("", 3), (None, 3)],
)
def test_a_task_with_one_device_of_its_own_takes_that(launched, shown, local_rank):
    environ = launched if shown is None else launched | {"CUDA_VISIBLE_DEVICES": shown}
    world = promised_world(environ)
    assert (world.rank, world.size, world.local_rank) == (7, 8, local_rank)


@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_launchers_that_share_their_environment_count_devices_by_local_rank(mark):
    environ = BY_HAND | {mark: "0", "CUDA_VISIBLE_DEVICES": "0"}
    assert promised_world(environ).local_rank == 3
