"""How a run starts: fresh, from its newest checkpoint, or from a named one."""

import shutil
from pathlib import Path
from typing import Any

from mmscale.checkpoint.files import (
    Checkpoint,
    newest_sound,
    open_together,
    step_folder,
    step_folders,
)
from mmscale.checkpoint.state import STATE
from mmscale.checkpoint.write import adopt_partial
from mmscale.config.load import flatten
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.dist.peers import barrier
from mmscale.errors import CheckpointError, ConfigError

# Settings that may change between the parts of one run.
MAY_DIFFER = ("run.", "engine.", "log.", "checkpoint.", "guard.")
MAY_DIFFER_EXACTLY = (
    "train.duration",
    "train.micro_batch_size",
    "data.workers",
    "data.cache_gb",
)
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "space.jsonl",
    "doctor.json",
    "examples.json",
    "report.html",
)


def starting_point(config: Config, world: World, warn: Any) -> Checkpoint | None:
    """The checkpoint that the run goes on from, or None; clears the folder of a run to overwrite.

    Raises:
        ConfigError: The folder holds a run that must not be touched.
        CheckpointError: The checkpoint asked for cannot be used.
    """
    run_dir = Path(config.run.dir)
    if config.run.resume == "auto":
        if world.is_main:
            adopt_partial(run_dir)
        return newest_sound(run_dir, world, warn)
    if config.run.resume != "never":
        return open_checkpoint(Path(config.run.resume), world)
    holds_run = bool(step_folders(run_dir)) or (run_dir / "metrics.jsonl").exists()
    if holds_run and not config.run.overwrite:
        raise ConfigError(
            f"run.resume=never, but run.dir={run_dir} holds a run; set run.overwrite=true to "
            "replace it, or another run.dir"
        )
    barrier()
    if holds_run and world.is_main:
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        for name in RUN_FILES:
            (run_dir / name).unlink(missing_ok=True)
    barrier()
    return None


def open_checkpoint(path: Path, world: World) -> Checkpoint:
    """A checkpoint folder, or the newest sound one of a run folder. Collective.

    Raises:
        CheckpointError: Neither.
    """
    if (path / STATE).exists():
        return open_together(path, world)
    newest = newest_sound(path, world)
    if newest is None:
        raise CheckpointError(
            f"{path}: neither a checkpoint nor a run with one; name a run folder or one of its "
            "checkpoints/step-NNNNNNNN"
        )
    return newest


def open_trained(path: Path) -> Checkpoint:
    """A checkpoint folder; of a run folder the best where one is kept by a metric, else the newest.

    Raises:
        CheckpointError: Neither.
    """
    opened = open_checkpoint(path, World())
    best = opened.progress.best
    if opened.folder == path or best is None or best.step == opened.progress.step:
        return opened
    return Checkpoint(step_folder(path, best.step))


def require_same_run(checkpoint: Checkpoint, config: Config, lanes: int) -> None:
    """Refuse to go on with settings that would make it another run.

    Args:
        checkpoint: Where the run goes on from.
        config: Its settings now.
        lanes: Lanes of the data now.

    Raises:
        ConfigError: Names each such setting with both values.
    """
    before, now = flatten(checkpoint.config), flatten(config)
    faults = [
        f"{key}={now[key]} differs from the {before[key]} that {checkpoint.folder} was trained "
        "with; put it back, or start another run.dir"
        for key in now
        if before[key] != now[key]
        and not key.startswith(MAY_DIFFER)
        and key not in MAY_DIFFER_EXACTLY
    ]
    if checkpoint.progress.lanes != lanes:
        faults.append(
            f"data.lanes={lanes} differs from the {checkpoint.progress.lanes} that "
            f"{checkpoint.folder} was trained with; use a number of ranks that divides "
            f"{checkpoint.progress.lanes}"
        )
    if faults:
        raise ConfigError("\n".join(faults))
