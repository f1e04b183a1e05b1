"""The one checkpoint format: safetensors, a file a rank, and `state.json`.

Tensors are whole and named, each held by one rank's file, so world, ZeRO stage and engine may
change between save and load. A folder is written aside and renamed when everything is on disk.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmscale.contracts import NamedTensor, Position, World
from mmscale.dist.peers import from_all, from_main
from mmscale.durable import publish, replace_file, sync
from mmscale.errors import CheckpointError

FORMAT, VERSION = "mmscale-checkpoint", 1
# What tensors that are not the model's are named with.
COMPANIONS = ("momentum.", "hard_batches.", "queue.")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Batches taken.
        updates: Updates made; smaller than `step` by those that were skipped.
        position: Where the stream goes on.
        damaged: Rows of this epoch that stood in for undecodable samples.
        lanes: Lanes of the data; the order of the rows depends on it.
        metrics: The newest evaluation.
        stage: Number of the stage that trains, from 0.
        stage_start: `step` at which that stage began.
    """

    step: int = 0
    updates: int = 0
    position: Position = field(default_factory=Position)
    damaged: int = 0
    lanes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stage: int = 0
    stage_start: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Progress":
        """Read what `state.json` keeps of it; what an older one lacks has its default."""
        known = {f.name: state[f.name] for f in fields(cls) if f.name in state}
        return cls(**{**known, "position": Position(**state["position"])})


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save(
    run_dir: Path,
    progress: Progress,
    config: dict[str, Any],
    tensors: Iterable[NamedTensor],
    random: dict[str, Tensor],
    world: World,
    keep: int,
) -> Path:
    """Write a checkpoint and drop the oldest beyond `keep`. Collective.

    Args:
        run_dir: The run's folder.
        progress: How far the run has come.
        config: The resolved configuration.
        tensors: The engine's tensors, in the same order on all ranks.
        random: This rank's random state.
        world: The ranks.
        keep: Checkpoints that stay.

    Raises:
        CheckpointError: A rank could not write; on every rank.
    """
    folder = step_folder(run_dir, progress.step)
    aside = folder.with_suffix(".partial")
    mine, shapes = _own_share(tensors, world)
    mine |= {f"rng/{name}": state for name, state in random.items()}
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    _everywhere(world, lambda: _make_aside(aside, world))
    digests = _everywhere(world, lambda: {name: _write_tensors(aside / name, mine)})
    files = {name: digest for part in digests for name, digest in part.items()}
    state = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(progress),
        "world": world.size,
        "config": config,
        "tensors": shapes,
        "files": files,
    }
    _everywhere(world, lambda: _finish(aside, folder, state, keep) if world.is_main else None)
    return folder


def _own_share(
    tensors: Iterable[NamedTensor], world: World
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's tensors on the CPU, and where every tensor is."""
    load = [0] * world.size
    mine: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    for tensor in tensors:
        owner = load.index(min(load))
        parts = {f"value/{tensor.name}": tensor.value} | {
            f"{key}/{tensor.name}": value for key, value in tensor.moments.items()
        }
        load[owner] += sum(value.nbytes for value in parts.values())
        shapes[tensor.name] = {
            "shape": list(tensor.value.shape),
            "rank": owner,
            "moments": sorted(tensor.moments),
        }
        if owner == world.rank:
            # A copy: the file must hold this moment, whatever the engine does with its memory.
            mine |= {k: v.detach().to("cpu", copy=True).contiguous() for k, v in parts.items()}
    return mine, shapes


def _everywhere(world: World, action: Any) -> list[Any]:
    """Run on every rank, then let all fail if one did."""
    try:
        outcome, fault = action(), None
    except (OSError, SafetensorError) as error:
        outcome, fault = None, f"rank {world.rank}: {error}"
    results = from_all(world, (outcome, fault))
    faults = [fault for _, fault in results if fault]
    if faults:
        raise CheckpointError(f"a checkpoint could not be written ({faults[0]}); free disk space")
    return [outcome for outcome, _ in results]


def _make_aside(aside: Path, world: World) -> None:
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    sync(path)
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _finish(aside: Path, folder: Path, state: dict[str, Any], keep: int) -> None:
    replace_file(aside / "state.json", json.dumps(state, indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)
    publish(aside, folder)
    for old in step_folders(folder.parent.parent)[keep:]:
        shutil.rmtree(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_folders(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


class Origin(Protocol):
    """What a segment of a run goes on from: named whole tensors and how far the run had come."""

    progress: Progress

    def load_weights(self, model: nn.Module) -> None:
        """Fill the model's parameters and buffers."""

    def load_momentum(self, own: Mapping[str, Tensor]) -> None:
        """Fill what the momentum encoder averages, by the names that the model has for it."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer state of a parameter; empty for one that was not trained."""

    def random(self, rank: int) -> dict[str, Tensor]:
        """Random state of a rank; empty where that rank did not exist."""

    def companions(self, prefix: str) -> dict[str, Tensor]:
        """Tensors that are not the model's, by what follows `prefix` in their names."""


class Checkpoint:
    """A checkpoint on disk, verified when opened."""

    def __init__(self, folder: Path):
        """Open and verify.

        Raises:
            CheckpointError: Not a checkpoint, or not what was written.
        """
        self.folder = folder
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: not a checkpoint (state.json: {error}); name a run folder or one of "
                "its checkpoints/step-NNNNNNNN"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: state.json does not describe a {FORMAT}")
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"{folder}: format version {state.get('version')}, this mmscale reads {VERSION}"
            )
        self._verify(state)
        self.config: dict[str, Any] = state["config"]
        self.world: int = state["world"]
        self.tensors: dict[str, Any] = state["tensors"]
        self.progress = Progress.from_state(state)

    def _verify(self, state: dict[str, Any]) -> None:
        for name, wanted in state["files"].items():
            path = self.folder / Path(name).name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is not whole")
            if path.stat().st_size != wanted["bytes"] or _sha256(path) != wanted["sha256"]:
                raise CheckpointError(f"{path}: not what was written (sha256 differs)")

    def read(self, kind: str, name: str) -> Tensor:
        """One tensor: `value` or a moment."""
        with safe_open(self._file(self.tensors[name]["rank"]), "pt") as file:
            return file.get_tensor(f"{kind}/{name}")

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer state of a parameter; empty for one that was not trained."""
        found = self.tensors.get(name, {}).get("moments", ())
        return {key: self.read(key, name) for key in found}

    def random(self, rank: int) -> dict[str, Tensor]:
        """Random state of a rank; empty where that rank did not exist."""
        if rank >= self.world:
            return {}
        with safe_open(self._file(rank), "pt") as file:
            names = [name for name in file.keys() if name.startswith("rng/")]  # noqa: SIM118
            return {name.removeprefix("rng/"): file.get_tensor(name) for name in names}

    def load_weights(self, model: nn.Module) -> None:
        """Fill the model's parameters and buffers.

        Raises:
            CheckpointError: The model is another; names the first differing tensors.
        """
        theirs = [name for name in self.tensors if not name.startswith(COMPANIONS)]
        self._fill(model.state_dict(), theirs, "")

    def load_momentum(self, own: Mapping[str, Tensor]) -> None:
        """Fill what the momentum encoder averages, by the names that the model has for it.

        Raises:
            CheckpointError: There is none, or that of another model.
        """
        prefix = COMPANIONS[0]
        self._fill(own, [name for name in self.tensors if name.startswith(prefix)], prefix)

    def companions(self, prefix: str) -> dict[str, Tensor]:
        """Tensors that are not the model's, by what follows `prefix` in their names.

        Raises:
            CheckpointError: There are none.
        """
        names = [name for name in self.tensors if name.startswith(prefix)]
        if not names:
            raise CheckpointError(f"{self.folder}: holds no {prefix}*; start another run.dir")
        return {name.removeprefix(prefix): self.read("value", name) for name in names}

    def _fill(self, own: Mapping[str, Tensor], names: list[str], prefix: str) -> None:
        theirs = {name.removeprefix(prefix): tuple(self.tensors[name]["shape"]) for name in names}
        faults = [
            f"{name} is {list(theirs[name])} there, {list(own[name].shape)} here"
            for name in own
            if name in theirs and theirs[name] != tuple(own[name].shape)
        ]
        faults += [f"{name} is missing there" for name in own if name not in theirs]
        faults += [f"{name} is unknown here" for name in theirs if name not in own]
        if faults:
            raise CheckpointError(
                f"{self.folder}: a checkpoint of another architecture: {len(faults)} tensors "
                f"differ ({'; '.join(faults[:5])}); build the model that it was saved from"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(self.read("value", prefix + name))

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}-of-{self.world:05d}.safetensors"


def newest_sound(run_dir: Path, world: World, warn: Any = lambda text: None) -> Path | None:
    """The newest checkpoint that verifies, decided by rank 0 and agreed; None without any.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
    """
    found, fault = None, None
    if world.is_main:
        folders = step_folders(run_dir)
        for folder in folders:
            try:
                Checkpoint(folder)
            except CheckpointError as error:
                warn(f"{error}; falling back to the checkpoint before it")
                fault = str(error)
                continue
            found, fault = str(folder), None
            break
    found, fault = from_main(world, (found, fault))
    if fault and not found:
        raise CheckpointError(f"{fault}; no checkpoint of the run can be used")
    return Path(found) if found else None
