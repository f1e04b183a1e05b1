"""How a run starts: fresh, from its newest checkpoint, or from a named one, on the data it had."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmscale.checkpoint.exported import ExportFolder, export_at
from mmscale.checkpoint.files import (
    Checkpoint,
    best_blend,
    newest_sound,
    open_together,
    step_folder,
    step_folders,
)
from mmscale.checkpoint.state import BLEND, DIGEST, STATE, FileRecord
from mmscale.checkpoint.write import adopt_partial
from mmscale.config.load import flatten, read_yaml, validate
from mmscale.config.model import ModelConfig
from mmscale.config.rules import needs_momentum
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.data.shards import ShardSet
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.presets import HF, OPENCLIP
from mmscale.parallel.peers import barrier, broadcast_object

# Settings that may change between the parts of one run.
MAY_DIFFER = ("engine.", "log.", "checkpoint.", "eval.", "retain.", "probe.", "guard.")
MAY_DIFFER_EXACTLY = (
    "run.dir",
    "run.resume",
    "run.overwrite",
    "run.sync",
    "train.duration",
    "train.micro_batch_size",
    "stop.patience",
    "stop.above_chance",
    "stop.rise",
    "data.workers",
    "data.eval",
    "data.cache",
    "data.feature_cache",
    "data.decoded_cache",
    "data.cache_gb",
)
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "space.jsonl",
    "doctor.json",
    "examples.json",
    "report.html",
    "retention.json",
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
        newest = newest_sound(run_dir, world, warn)
        if newest is None:
            _require_no_other_run(config, world)
        return newest
    if config.run.resume != "never":
        _require_no_other_run(config, world)
        return open_checkpoint(Path(config.run.resume), world)
    holds_run = bool(step_folders(run_dir)) or (run_dir / "metrics.jsonl").exists()
    if holds_run and not config.run.overwrite:
        raise ConfigError(
            f"run.resume=never, but run.dir={run_dir} holds a run; set run.overwrite=true to "
            "replace it, or another run.dir"
        )
    barrier()
    if holds_run and world.is_main:
        for folder in (run_dir / "checkpoints", best_blend(run_dir)):
            shutil.rmtree(folder, ignore_errors=True)
        for name in RUN_FILES:
            (run_dir / name).unlink(missing_ok=True)
    barrier()
    return None


def _require_no_other_run(config: Config, world: World) -> None:
    """Refuse a folder with the log of a run of other settings, which would be lost. Collective.

    One of the same settings was ended before its first checkpoint, and starts over.
    """
    fault, run_dir = None, Path(config.run.dir)
    log = run_dir / "metrics.jsonl"
    if world.is_main and log.exists() and log.stat().st_size:
        try:
            require_like(run_dir / "config.yaml", config, f"run.dir={run_dir}")
        except ConfigError as error:
            fault = str(error)
    if fault := broadcast_object(world, fault):
        raise ConfigError(fault)


def require_like(path: Path, config: Config, place: str, contents: Mapping[str, str] = {}) -> None:
    """Refuse a place whose run has other settings, as far as its `config.yaml` tells.

    Args:
        path: That file.
        config: This run's settings.
        place: Setting and value that name the place.
        contents: Settings that name what may lie elsewhere here.

    Raises:
        ConfigError: They differ, or the file cannot be read.
    """
    try:
        differing = _differing(validate(read_yaml(path)), config, contents, contents)
        fault = "; ".join(f"{key}={before} there, {now} here" for key, before, now in differing)
    except ConfigError as error:
        fault = str(error).splitlines()[0]
    if fault:
        raise ConfigError(
            f"{place} holds another run ({fault}); set another {place.partition('=')[0]}, or "
            "run.resume=never run.overwrite=true to replace it"
        )


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
    """A checkpoint folder; of a run folder the best one.

    That is the blend of its first and its newest, where its end has chosen one; else the best
    where one is kept by a metric, else the newest.

    Raises:
        CheckpointError: Neither.
    """
    opened = open_checkpoint(path, World())
    if opened.folder != path and (blend := _blend_of(path, opened)) is not None:
        return blend
    best = opened.state.best
    if opened.folder == path or best is None or best.step == opened.state.step:
        return opened
    return Checkpoint(step_folder(path, best.step))


def _blend_of(run_dir: Path, newest: Checkpoint) -> Checkpoint | None:
    """The blend that a run has chosen at its end, unless it has gone on since."""
    folder = best_blend(run_dir)
    if not (folder / STATE).exists():
        return None
    blend = Checkpoint(folder)
    return blend if newest.folder.name in blend.parts.get(BLEND, {}).get("of", ()) else None


def first_weights(model: ModelConfig) -> Checkpoint | ExportFolder | None:
    """What `model.weights` names a folder of: another run begins with its weights.

    Raises:
        ConfigError: An export that keeps no tensors by name, or no folder where one is needed.
        CheckpointError: The folder is neither a run, a checkpoint nor an export.
    """
    path = Path(model.weights)
    if path.is_dir():
        return export_at(path) or open_trained(path)
    if model.weights != "random" and not (model.preset or "").startswith((HF, OPENCLIP)):
        raise ConfigError(
            f"model.weights={model.weights}: no such folder; name a run, checkpoint or export "
            "to begin with, or set random (a tower's own are model.vision.weights and "
            "model.text.weights)"
        )
    return None


def require_same_run(
    checkpoint: Checkpoint,
    config: Config,
    contents: Mapping[str, str],
    lanes: Sequence[int],
    but: str = "-",
) -> None:
    """Refuse to go on with settings, or with data, that would make it another run.

    Args:
        checkpoint: Where the run goes on from.
        config: Its settings now.
        contents: What those that name files and folders stand for now.
        lanes: Lanes of the data now, in each stage.
        but: Settings that begin so are not looked at.

    Raises:
        ConfigError: Names each such setting with both values.
    """
    folder, state = checkpoint.folder, checkpoint.state
    if BLEND in checkpoint.parts:
        raise ConfigError(
            f"{folder} is a blend, which has no optimizer state to go on with; for a run that "
            f"begins with its weights set model.weights={folder} and leave run.resume out"
        )
    repair = "put it back, or start another run.dir"
    if config.run.resume not in ("auto", "never"):
        repair = (
            "put it back, since run.resume goes on with the same run; for another run that begins "
            f"with its weights set model.weights={config.run.resume} and leave run.resume out"
        )
    faults = [
        f"{key}={now} differs from the {before} that {folder} was trained with; {repair}"
        for key, before, now in _differing(checkpoint.config, config, checkpoint.contents, contents)
        if not key.startswith(but)
    ]
    if checkpoint.contents.get(MASK) != contents.get(MASK) and not faults:
        faults.append(
            f"{MASK}={config.data.mask} leaves out other images than it did when {folder} was "
            "trained; put the file back as it was, or start another run.dir"
        )
    before, now = checkpoint.contents.get(DATA, ""), contents[DATA]
    if before != now and not faults:
        faults.append(
            f"{DATA}={config.data.train} holds other shards (digest {now[:12]}) than those "
            f"({before[:12]}) that {folder} was trained on; restore them, or start another run.dir"
        )
    now_lanes = lanes[state.stage] if state.stage < len(lanes) else state.lanes
    if state.lanes != now_lanes:
        faults.append(
            f"data.lanes={now_lanes} differs from the {state.lanes} that {folder} was trained "
            f"with; use a number of ranks that divides {state.lanes}"
        )
    if needs_momentum(config) and not needs_momentum(checkpoint.config):
        faults.append(
            f"eval.weights={config.eval.weights} needs the running mean of the weights, which "
            f"{folder} was trained without; put eval.weights=trained"
        )
    if faults:
        raise ConfigError("\n".join(faults))


def _differing(
    before: Config, now: Config, contents: Mapping[str, str], contents_now: Mapping[str, str]
) -> list[tuple[str, Any, Any]]:
    """Settings of another run: each with its value before and now."""
    then = flatten(before)
    return [
        (key, then[key], value)
        for key, value in flatten(now).items()
        if then[key] != value
        and not key.startswith(MAY_DIFFER)
        and key not in MAY_DIFFER_EXACTLY
        and (key not in contents or contents[key] != contents_now.get(key))
    ]


DATA, MASK = "data.train", "data.mask"
# Read when a run begins, never again: what lies there matters only where the path has changed.
_ONCE = (
    "data.hard_batches.table",
    "model.preset",
    "model.weights",
    "model.vision.name",
    "model.vision.weights",
    "model.text.name",
    "model.text.weights",
)
# Settings whose value is what lies there.
NAMED = (DATA, *_ONCE)


def contents_of(
    config: Config, shards: ShardSet, world: World, before: tuple[Config, Mapping[str, str]] | None
) -> dict[str, str]:
    """Digest by setting, of those that name something on a disk. Collective.

    Args:
        config: The run's.
        shards: What `data.train` names.
        world: The ranks; files are those that rank 0 sees.
        before: Configuration and contents of the checkpoint that the run goes on from. What is
            spelt as it was there is not read again.
    """
    found = {}
    if world.is_main:
        now, then = flatten(config), flatten(before[0]) if before else {}
        for key in _ONCE:
            if before and now[key] == then[key]:
                digest = before[1].get(key)
            else:
                digest = _digest_at(now[key])
            if digest is not None:
                found[key] = digest
    mask = {MASK: shards.mask} if shards.mask else {}
    return {DATA: _digest_of(shards), **mask, **broadcast_object(world, found)}


def _digest_of(shards: ShardSet) -> str:
    """Of the shards' bytes and samples, in their order, and the sources' weights.

    Without a manifest: of names, and sizes where they are files.
    """
    samples = [shard.samples for shard in shards.shards]
    unread = [] if shards.shards else [_name_and_size(place) for place in shards.paths]
    return _hash(json.dumps([shards.digest, shards.sources, samples, unread]).encode())


def _name_and_size(place: Path | str) -> tuple[str, int]:
    return (place.name, place.stat().st_size) if isinstance(place, Path) else (place, 0)


def _digest_at(value: Any) -> str | None:
    """Of the file or folder that a setting names; None where it names neither."""
    if not isinstance(value, str):
        return None
    # `hf:PATH`, `openclip:local-dir:PATH`.
    parts = value.split(":")
    spellings = (":".join(parts[start:]) for start in range(len(parts)))
    try:
        path = next(p for p in (Path(s).expanduser() for s in spellings if s) if p.exists())
        if path.is_file():
            return FileRecord.of(path).sha256
        if (path / DIGEST).is_file():
            # A checkpoint, whose other files its state vouches for.
            return FileRecord.of(path / DIGEST).sha256
        if (path / "checkpoints").is_dir():
            # A run, which may have gone on since.
            return None
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
        return _hash("".join(f"{p.relative_to(path)} {FileRecord.of(p).sha256}\n" for p in files))
    except (StopIteration, OSError, ValueError, RuntimeError):
        return None


def _is_hidden(path: Path, within: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(within).parts)


def _hash(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
