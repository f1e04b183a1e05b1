"""Before the first step: every rank runs the same, and there is room for what the run writes."""

import hashlib
import shutil
from pathlib import Path

import torch
from torch import nn

from mmscale.checkpoint.files import step_folders
from mmscale.config.load import flatten
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.dist.peers import from_all, from_main
from mmscale.errors import ConfigError, DataError, LaunchError
from mmscale.outputs import require_folder

_PACKAGE = Path(__file__).resolve().parent
# Of this many checkpoints: the one that is kept until the next one is whole, and that one.
_CHECKPOINTS = 2
_MOMENTS = 2


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
    everyone = from_all(world, mine)
    for rank, theirs in enumerate(everyone):
        first = everyone[0]
        if theirs["settings"] != first["settings"]:
            raise ConfigError(_differing(from_all(world, settings), rank))
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
    if faults := [fault for fault in from_all(world, fault) if fault]:
        raise ConfigError(faults[0])


def require_room(config: Config, model: nn.Module, momentum: bool, world: World) -> None:
    """Refuse to start where two checkpoints have no room. Collective.

    Args:
        config: The run.
        model: Whole, before an engine takes it.
        momentum: A running mean of the trained weights is saved too.
        world: The ranks; the disk is the one that rank 0 sees.

    Raises:
        ConfigError: Names what is free and what is needed.
    """
    fault = None
    if world.is_main:
        run_dir = Path(config.run.dir)
        there = next(path for path in (run_dir, *run_dir.resolve().parents) if path.exists())
        # What is there already is overwritten in turn.
        missing = max(1, _CHECKPOINTS - len(step_folders(run_dir)))
        needed, free = missing * checkpoint_bytes(model, momentum), shutil.disk_usage(there).free
        if free < needed:
            fault = (
                f"run.dir={run_dir}: {free / 1e6:,.1f} MB are free, and {missing} checkpoints of "
                f"this run need {needed / 1e6:,.1f} MB; free disk space or set another run.dir"
            )
    if fault := from_main(world, fault):
        raise ConfigError(fault)


def checkpoint_bytes(model: nn.Module, momentum: bool) -> int:
    """Bytes of a checkpoint: fp32 weights, two moments of what is trained, its running mean."""
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return whole + (_MOMENTS + momentum) * trained


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
