"""The writing side: a moment of the run in host memory, and its way to disk.

A rank writes its file and, when that is on disk, a note with its digest. The folder gets its final
name when all notes are there, which a later start can do as well as the run that wrote them.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mmscale.checkpoint.files import PARTIAL, step_folder, step_folders, step_of
from mmscale.checkpoint.state import (
    DIGEST,
    FORMAT,
    VERSION,
    FileRecord,
    RunState,
    rank_file,
    write_state,
)
from mmscale.contracts import NamedTensor, World
from mmscale.errors import HaltError
from mmscale.outputs import publish, replace_file, sync

_DRAFT = "draft.json"
# Suffix of a folder that is being removed.
OLD = ".old"


@dataclass(frozen=True)
class Kept:
    """What every checkpoint of a run holds alike.

    Attributes:
        config: The resolved configuration, as JSON has it.
        contents: Digest of what each setting that names files or folders stands for.
        attached: Further files by their names in the folder, such as `text/tokenizer.json`.
    """

    config: dict[str, Any]
    contents: Mapping[str, str] = field(default_factory=dict)
    attached: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A moment of the run, as much of it as this rank writes.

    Attributes:
        tensors: This rank's share, in host memory of its own.
        state: What `state.json` is going to hold, the files' digests excepted.
        run: What the run is at.
        rank: This rank.
        attached: Further files by their names in the folder; rank 0 writes them.
        trained: Names of the parameters that are trained.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    run: RunState
    rank: int
    attached: Mapping[str, bytes] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Name of this rank's file."""
        return rank_file(self.rank, self.state["world"])

    @property
    def others_kept(self) -> set[int]:
        """Steps of those that stay whatever their age: the best, and what is compared with."""
        best = set() if self.run.best is None else {self.run.best.step}
        return best | ({0} if self.state["config"].get("retain", {}).get("sets") else set())

    @property
    def bytes(self) -> int:
        """Of this rank's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def take_snapshot(
    run: RunState,
    parts: Mapping[str, Any],
    kept: Kept,
    tensors: Iterable[NamedTensor],
    random: dict[str, Tensor],
    world: World,
) -> Snapshot:
    """Copy the run's state to host memory, dealt out over ranks. Collective.

    Args:
        run: What the run is at.
        parts: What its parts remember, as JSON by their names.
        kept: What is the same in all checkpoints of the run.
        tensors: The engine's and its parts', in the same order on all ranks.
        random: This rank's random state.
        world: The ranks.
    """
    load = [0] * world.size
    mine: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    trained = set()
    for tensor in tensors:
        if tensor.trained:
            trained.add(tensor.name)
        owner = load.index(min(load))
        values = {f"value/{tensor.name}": tensor.value} | {
            f"{key}/{tensor.name}": value for key, value in tensor.moments.items()
        }
        load[owner] += sum(value.nbytes for value in values.values())
        shapes[tensor.name] = {
            "shape": list(tensor.value.shape),
            "rank": owner,
            "moments": sorted(tensor.moments),
        }
        if owner == world.rank:
            # A copy: the file must hold this moment, whatever the engine does with its memory.
            mine |= {k: v.detach().to("cpu", copy=True).contiguous() for k, v in values.items()}
    mine |= {f"rng/{name}": state for name, state in random.items()}
    state = {
        "format": FORMAT,
        "version": VERSION,
        "world": world.size,
        "config": kept.config,
        "contents": dict(kept.contents),
        "state": asdict(run),
        "parts": dict(parts),
        "tensors": shapes,
    }
    return Snapshot(mine, state, run, world.rank, kept.attached, frozenset(trained))


def write_share(snapshot: Snapshot, aside: Path) -> None:
    """Write this rank's file and then its note; rank 0 writes all that is not a rank's, too.

    Raises:
        HaltError: Something that was trained is not finite; nothing is written.
        OSError: The disk does not take it; so may SafetensorError say.
    """
    if name := _not_finite(snapshot):
        raise HaltError(f"{name} is not finite")
    path = aside / snapshot.name
    save_file(snapshot.tensors, path)
    sync(path)
    if snapshot.rank == 0:
        files = {}
        for name, content in snapshot.attached.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(aside / name, content)
            files[name] = FileRecord.of(aside / name).model_dump()
        draft = {**snapshot.state, "files": files}
        replace_file(aside / _DRAFT, json.dumps(draft, indent=1).encode())
    replace_file(_note(path), FileRecord.of(path).model_dump_json().encode())


def _not_finite(snapshot: Snapshot) -> str | None:
    """The first tensor that holds no number, or infinity where the optimizer moves it."""
    for key, tensor in snapshot.tensors.items():
        name = key.partition("/")[2]
        if tensor.is_floating_point():
            sound = tensor.isfinite() if name in snapshot.trained else ~tensor.isnan()
            if not sound.all():
                return name
    return None


def publish_if_whole(aside: Path) -> Path | None:
    """Give a folder that every rank has written its final name; None where something is missing."""
    # With the digest of state.json only the rename is missing.
    if not (aside / DIGEST).exists():
        try:
            state = json.loads((aside / _DRAFT).read_text("utf-8"))
            names = (rank_file(rank, state["world"]) for rank in range(state["world"]))
            notes = {name: json.loads(_note(aside / name).read_text("utf-8")) for name in names}
            state["files"].update(notes)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return None
        write_state(aside, state)
    for left in (aside / _DRAFT, *aside.glob("rank-*.json")):
        left.unlink(missing_ok=True)
    folder = aside.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    publish(aside, folder)
    return folder


def adopt_partial(run_dir: Path) -> None:
    """At a start, rank 0: publish what a run had written when it died, remove what it had not."""
    folder = run_dir / "checkpoints"
    for aside in sorted(folder.glob(f"step-*{PARTIAL}")):
        if publish_if_whole(aside) is None:
            shutil.rmtree(aside)
    for old in folder.glob(f"step-*{OLD}"):
        shutil.rmtree(old)


def prune(
    run_dir: Path, step: int, keep: int, counts: Callable[[int], bool], others: Collection[int]
) -> None:
    """Keep that of `step`, the newest `keep` up to it that count, and some others.

    Later ones belong to a course that the run has left: it went on from an earlier checkpoint.
    """
    folders = {step_of(path): path for path in step_folders(run_dir)}
    counted = sorted((at for at in folders if at <= step and counts(at)), reverse=True)
    kept = {step, *counted[:keep], *others}
    for at, path in folders.items():
        if at not in kept:
            # Renamed first: a folder that has its name is whole.
            shutil.rmtree(path.rename(path.with_suffix(OLD)))


def drop_for_room(run_dir: Path, step: int, others: Collection[int], needed: int) -> list[str]:
    """Remove the oldest checkpoints, if that makes room; never the newest up to `step`.

    Args:
        run_dir: The run's folder.
        step: Of the checkpoint that had no room.
        others: Steps of those that stay as well.
        needed: Its bytes.

    Returns:
        Names of those that were removed.
    """
    folders = [path for path in step_folders(run_dir) if path != step_folder(run_dir, step)]
    newest = next((path for path in folders if path < step_folder(run_dir, step)), None)
    kept = {newest, *(step_folder(run_dir, other) for other in others)}
    old = [path for path in reversed(folders) if path not in kept]
    held = {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in old}
    removed: list[str] = []
    if shutil.disk_usage(run_dir).free + sum(held.values()) < needed:
        return removed
    for path in old:
        # At least one: a quota does not show in what is free.
        if removed and shutil.disk_usage(run_dir).free >= needed:
            break
        shutil.rmtree(path.rename(path.with_suffix(OLD)))
        removed.append(path.name)
    return removed


def _note(path: Path) -> Path:
    return path.with_suffix(".json")
