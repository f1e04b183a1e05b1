"""Before the first step: every rank runs the same, and there is room for what the run writes."""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from mmscale.checkpoint.files import Checkpoint, step_folders
from mmscale.checkpoint.lock import RunLock
from mmscale.checkpoint.mirror import meet
from mmscale.checkpoint.resume import contents_of, require_same_run, starting_point
from mmscale.checkpoint.write import Kept
from mmscale.config.load import flatten
from mmscale.config.schema import Config
from mmscale.config.values import Duration
from mmscale.contracts import World
from mmscale.data.shards import ShardSet
from mmscale.errors import ConfigError, DataError, LaunchError
from mmscale.outputs import require_folder
from mmscale.parallel.peers import broadcast_object, gather_objects

_PACKAGE = Path(__file__).resolve().parent
_MOMENTS = 2


def begin(
    run: Config,
    lanes: Sequence[int],
    shards: ShardSet,
    lock: RunLock | None,
    world: World,
    tell: Callable[[str], None],
) -> tuple[Checkpoint | None, Kept]:
    """What a run goes on from, if anything, and what its checkpoints hold. Collective.

    Whether it is the same run is decided here, by the user's words and what they name, before any
    of it is built; only another model is told by its tensors, when it is there.

    Args:
        run: The user's configuration, presets filled.
        lanes: Lanes of the data in each stage.
        shards: What `data.train` names.
        lock: Taken before anything looks into the run's folder.
        world: The ranks.
        tell: Takes a line about what is passed over or waited for.
    """
    require_same_everywhere(run, shards.digest, world)
    if lock is not None:
        lock.take(world, tell)
        meet(run, world, tell)
    origin = starting_point(run, world, tell)
    before = None if origin is None else (origin.config, origin.contents)
    contents = contents_of(run, shards, world, before)
    if origin is not None:
        require_same_run(origin, run, contents, lanes, but="model.")
    return origin, Kept(run.model_dump(mode="json"), contents)


def require_same_everywhere(config: Config, data_digest: str, world: World) -> None:
    """Refuse ranks that were started with different settings, code or data. Collective.

    Args:
        config: This rank's settings.
        data_digest: Of the shards that this rank reads.
        world: The ranks.

    Raises:
        ConfigError: Settings differ; names each with both values.
        LaunchError: The code differs, or torch.
        DataError: The shards differ.
    """
    settings = {key: str(value) for key, value in flatten(config).items()}
    mine = {
        "settings": _digest(str(settings).encode()),
        "mmscale": code_digest(),
        "torch": torch.__version__,
        "data": _digest(data_digest.encode()),
    }
    everyone = gather_objects(world, mine)
    for rank, theirs in enumerate(everyone):
        first = everyone[0]
        if theirs["settings"] != first["settings"]:
            raise ConfigError(_differing(gather_objects(world, settings), rank))
        for what in ("mmscale", "torch"):
            if theirs[what] != first[what]:
                raise LaunchError(
                    f"rank {rank} runs another {what} ({theirs[what][:16]}) than rank 0 "
                    f"({first[what][:16]}); give every node the same checkout and environment"
                )
        if theirs["data"] != first["data"]:
            raise DataError(
                f"data.train={config.data.train}: rank {rank} reads other shards than rank 0; give "
                "every node the same files"
            )


def require_outputs(config: Config, world: World) -> None:
    """Refuse folders that a run is going to fill and cannot. Collective.

    Raises:
        ConfigError: Names the setting, the folder and the reason.
    """
    fault = None
    try:
        require_folder("run.dir", Path(config.run.dir))
        cache = Path(config.data.decoded_cache or config.run.dir)
        # One that others have filled serves without being written to.
        if not any(cache.glob("*/*.safetensors")):
            require_folder("data.decoded_cache", cache)
    except ConfigError as error:
        fault = str(error)
    if faults := [fault for fault in gather_objects(world, fault) if fault]:
        raise ConfigError(faults[0])


def require_room(
    config: Config,
    model: nn.Module,
    ahead: int,
    momentum: bool,
    world: World,
    start: bool = False,
) -> None:
    """Refuse to start where the checkpoints that are kept, and the next one, have no room.

    Collective.

    Args:
        config: The run.
        model: Whole, before an engine takes it.
        ahead: Checkpoints that the run is going to write.
        momentum: A running mean of the trained weights is saved too.
        world: The ranks; the disk is the one that rank 0 sees.
        start: The weights that the run began with are saved too.

    Raises:
        ConfigError: Names what is free and what is needed.
    """
    fault = None
    if world.is_main:
        run_dir, kept = Path(config.run.dir), config.checkpoint.keep
        there = next(path for path in (run_dir, *run_dir.resolve().parents) if path.exists())
        # The next one is whole before the oldest goes; what is there already goes in turn.
        besides = (config.checkpoint.best is not None) + bool(config.retain.sets)
        most = kept + 1 + besides - len(step_folders(run_dir))
        missing = max(1, min(most, ahead))
        needed = missing * checkpoint_bytes(model, momentum, start)
        free = shutil.disk_usage(there).free
        if free < needed:
            fault = (
                f"run.dir={run_dir}: {free / 1e6:,.1f} MB are free, and {missing} "
                f"checkpoint{'s' * (missing > 1)} of this run need {needed / 1e6:,.1f} MB "
                f"(checkpoint.keep={kept}, and the next one before the oldest goes); free disk "
                "space, keep fewer or set another run.dir"
            )
    if fault := broadcast_object(world, fault):
        raise ConfigError(fault)


def checkpoints_ahead(config: Config, steps: int, steps_of: Callable[[Duration], int]) -> int:
    """How many checkpoints a run writes in so many steps, the one at its end included."""
    checkpoint, evaluation = config.checkpoint, config.eval
    due = [checkpoint.every, evaluation.every if checkpoint.best else None]
    written = max(1, sum(math.ceil(steps / max(1, steps_of(every))) for every in due if every))
    # The run's start is kept too, where it is compared with.
    return written + bool(config.retain.sets)


def checkpoint_bytes(model: nn.Module, momentum: bool, start: bool = False) -> int:
    """Bytes of a checkpoint: fp32 weights, two moments of what is trained, its running mean.

    With `start` the first weights besides.
    """
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return (1 + start) * whole + (_MOMENTS + momentum) * trained


def code_digest() -> str:
    """Of the package's files as they are on disk."""
    files = sorted(_PACKAGE.rglob("*.py"))
    return _digest(b"".join(str(f.relative_to(_PACKAGE)).encode() + f.read_bytes() for f in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _differing(settings: list[dict[str, str]], rank: int) -> str:
    first, theirs = settings[0], settings[rank]
    return "\n".join(
        f"{key}={theirs[key]} on rank {rank} differs from the {first[key]} of rank 0; start every "
        "rank with the same words and files"
        for key in first
        if theirs[key] != first[key]
    )
