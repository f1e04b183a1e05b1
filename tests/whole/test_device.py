"""A run on a machine that shows a device which then fails: here MPS, which torch lacks on Linux."""

import sys

import pytest
import torch

from tests.conftest import SyntheticPairs
from tests.whole.command import explain, run
from tests.whole.small_run import metrics, words_for, write_settings

# Torch itself refuses the device; only the table of what the machine has is another.
AS_A_MAC = """
import sys
from mmscale.parallel import device
from mmscale.train import main
device.this_machine = lambda: device.Machine(mps=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS works here")
def test_a_run_whose_rehearsal_fails_on_mps_is_built_on_the_cpu(
    synthetic: SyntheticPairs, tmp_path
) -> None:
    words = [*words_for(synthetic, write_settings(tmp_path)), f"run.dir={tmp_path / 'run'}"]
    words += ["train.duration=3 steps", "checkpoint.every=null", "run.resume=never"]
    done = run([sys.executable, "-c", AS_A_MAC, *words])
    assert done.returncode == 0, explain(done)
    assert "an update failed on mps" in done.stderr
    assert "the run is built on the CPU" in done.stderr
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert lines[-1]["finished"]
