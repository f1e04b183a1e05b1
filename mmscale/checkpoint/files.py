"""The one checkpoint format: safetensors, a file a rank, and `state.json`.

Tensors are whole and named, each held by one rank's file, so world, ZeRO stage and engine may
change between save and load. A folder is written aside and renamed when everything is on disk.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmscale.contracts import Position, World
from mmscale.dist.peers import from_all, from_main
from mmscale.errors import CheckpointError

FORMAT, VERSION = "mmscale-checkpoint", 1
# What tensors that are not the model's are named with.
COMPANIONS = ("momentum.", "hard_batches.", "queue.", "prototypes.")
# Suffix of a folder that is being written.
PARTIAL = ".partial"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: `metric` had this value after `step`."""

    metric: str
    value: float
    step: int


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
        went_back: How often the weights went back to an earlier checkpoint's.
        best: The best evaluation by `checkpoint.best`.
        scaler: State of the engine's loss scaling; empty without one.
        stage_updates: `updates` at which it began.
        samples: Rows taken since the run began.
        over: `stage` or `run` where an evaluation ended one of them before its time.
        watched: What decides about that, by name.
        owes_evaluation: The run was told to stop before an evaluation that was due.
    """

    step: int = 0
    updates: int = 0
    position: Position = field(default_factory=Position)
    damaged: int = 0
    lanes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stage: int = 0
    stage_start: int = 0
    went_back: int = 0
    best: Best | None = None
    scaler: dict[str, float] = field(default_factory=dict)
    stage_updates: int = 0
    samples: int = 0
    over: str = ""
    watched: dict[str, float] = field(default_factory=dict)
    owes_evaluation: bool = False

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Progress":
        """Read what `state.json` keeps of it; what an older one lacks has its default."""
        known = {f.name: state[f.name] for f in fields(cls) if f.name in state}
        objects = {
            "position": Position(**state["position"]),
            "best": Best(**state["best"]) if state.get("best") else None,
        }
        return cls(**known | objects)


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def rank_file(rank: int, world: int) -> str:
    """Name of what a rank wrote."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def digest_of(path: Path) -> dict[str, Any]:
    """What a file must be when it is read again."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


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

    def __init__(self, folder: Path, readers: World | None = None):
        """Open and verify.

        Args:
            folder: Of the checkpoint.
            readers: Ranks that verify a share of the files each; default all files here.

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
        self._verify(state["files"], readers or World())
        self.config: dict[str, Any] = state["config"]
        self.world: int = state["world"]
        self.tensors: dict[str, Any] = state["tensors"]
        self.progress = Progress.from_state(state)

    def _verify(self, files: dict[str, Any], readers: World) -> None:
        for name in sorted(files)[readers.rank :: readers.size]:
            path, wanted = self.folder / Path(name).name, files[name]
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is not whole")
            if path.stat().st_size != wanted["bytes"] or digest_of(path) != wanted:
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
        return self.folder / rank_file(rank, self.world)


def open_together(folder: Path, world: World) -> Checkpoint:
    """Open a checkpoint on every rank, each verifying a share of its files. Collective.

    Raises:
        CheckpointError: A rank found a fault; on every rank.
    """
    opened, fault = None, None
    try:
        opened = Checkpoint(folder, world)
    except CheckpointError as error:
        fault = str(error)
    fault = next((fault for fault in from_all(world, fault) if fault), None)
    if opened is None or fault:
        raise CheckpointError(str(fault))
    return opened


def _warn(text: str) -> None:
    sys.stderr.write(f"mmscale: {text}\n")


def newest_sound(
    run_dir: Path, world: World, warn: Callable[[str], None] = _warn, before: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that verifies, agreed by all ranks; None without any. Collective.

    Args:
        run_dir: The run's folder.
        world: The ranks; which checkpoints there are is what rank 0 sees.
        warn: Takes a line about each one that is passed over.
        before: Only those of earlier steps.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
    """
    found = step_folders(run_dir) if world.is_main else []
    names = from_main(world, [str(path) for path in found])
    if before is not None:
        names = [name for name in names if Path(name) < step_folder(run_dir, before)]
    fault = None
    for name in names:
        try:
            return open_together(Path(name), world)
        except CheckpointError as error:
            fault = error
            if name != names[-1]:
                warn(f"{error}; falling back to the checkpoint before it")
    if fault:
        raise CheckpointError(f"{fault}; no checkpoint of the run can be used")
    return None
