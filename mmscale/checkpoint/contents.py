"""What the settings that name files and folders stand for: a digest of what lies there.

A path is a spelling: data moves to a faster disk, and another working folder makes a relative path
absolute. What lies behind it is what a run depends on.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.checkpoint.state import DIGEST, FileRecord
from mmscale.config.load import flatten
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.data.shards import ShardSet
from mmscale.parallel.peers import from_main

DATA = "data.train"
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
    return {DATA: _digest_of(shards), **from_main(world, found)}


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
