"""Train a dual encoder: the file that launchers start. Functions only; read it from the top.

deepspeed mmscale/train.py CONFIG key=value ...      accelerate launch mmscale/train.py CONFIG ...
"""

import gc
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mmscale.config.load import load_config
from mmscale.config.schema import Config
from mmscale.errors import saying_how_to_go_on
from mmscale.parallel.signals import heeding_signals


def main(words: Sequence[str]) -> int:
    """Run the words of a command line; returns the exit code."""
    # A mistake in the configuration is told before torch is imported.
    return heeding_signals(lambda: run(load_config(words)))


def run(config: Config) -> int:
    """Train as configured, on every rank that was started; all of them fail together."""
    _prepare_process()
    with saying_how_to_go_on(lambda: _way_on(config)):
        from mmscale.checkpoint.mirror import Mirror
        from mmscale.parallel.failure import failing_together
        from mmscale.parallel.world import leave, promised_world

        world = promised_world()
        # What is left to copy is copied when no rank waits for this one any more.
        with Mirror(config.run, world) as mirror:
            with failing_together(world):
                from mmscale.training.loop import train

                gc.enable()
                train(config, world, mirror)
            leave()
    return 0


def _prepare_process() -> None:
    """What must be set before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Workers fork, and OpenMP threads that spin starve a decoding worker of its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Blocks as large as a batch in pages of 2 MB: a fault for every 4 KiB costs more than the copy.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # Captions differ in length from batch to batch, which leaves gaps in blocks of fixed size.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # The number of decoding processes is the user's setting, not a mistake to warn of on each rank.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # What imports leave stays to the end: to search it for garbage took a seventh of their time.
    gc.disable()


def _way_on(config: Config) -> str:
    """How a run that a signal has ended goes on; torch need not be there yet."""
    kept = sorted(Path(config.run.dir).glob("checkpoints/step-" + 8 * "[0-9]"))
    if not kept:
        features = ", with the features computed so far" if config.data.feature_cache else ""
        return f"no checkpoint was written yet, the same command begins anew{features}"
    command = "the same command"
    if config.run.resume == "never":
        command += " with run.resume=auto"
    return f"{command} goes on from step {int(kept[-1].name.removeprefix('step-'))}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
