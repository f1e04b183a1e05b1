"""`state.json`: what a checkpoint knows besides its tensors, under a digest and a schema.

Its digest lies beside it in `state.sha256`, as `sha256sum` writes it; the digests of all other
files are in it. Nothing has a default here: a key that is missing is a fault, like one that is
unknown.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmscale.contracts import Position
from mmscale.errors import CheckpointError
from mmscale.outputs import replace_file

FORMAT, VERSION = "mmscale-checkpoint", 2
STATE, DIGEST = "state.json", "state.sha256"
# Among the parts of a checkpoint that no run wrote: what it is a blend of.
BLEND = "blend"

_Count = Annotated[int, Field(ge=0, lt=2**63)]
# Names within the folder: no absolute path, no `..`, nothing hidden.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_NOT_ONE = "name a run folder or one of its checkpoints/step-NNNNNNNN"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: `metric` had this value after `step`."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class RunState:
    """What a run is at.

    Attributes:
        step: Batches taken.
        updates: Updates made; smaller than `step` by those that were skipped.
        samples: Rows taken since the run began.
        position: Where the stream goes on.
        damaged: Rows of this epoch that stood in for undecodable samples.
        lanes: Lanes of the data; the order of the rows depends on it.
        stage: Number of the stage that trains, from 0.
        stage_start: `step` at which that stage began.
        stage_updates: `updates` at which it began.
        over: `stage` or `run` where an evaluation ended one of them before its time.
        best: The best evaluation by `checkpoint.best`.
        scaler: State of the engine's loss scaling; empty without one.
    """

    step: int = 0
    updates: int = 0
    samples: int = 0
    position: Position = field(default_factory=Position)
    damaged: int = 0
    lanes: int = 0
    stage: int = 0
    stage_start: int = 0
    stage_updates: int = 0
    over: str = ""
    best: Best | None = None
    scaler: dict[str, float] = field(default_factory=dict)


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileRecord(_Record):
    """What a file must be when it is read again."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: _Count

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file on disk."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(sha256=digest, bytes=path.stat().st_size)


class TensorRecord(_Record):
    """A named tensor: its shape, which rank's file holds it, and its moments' names."""

    shape: tuple[_Count, ...]
    rank: _Count
    moments: tuple[str, ...]


class State(_Record):
    """What `state.json` holds.

    Attributes:
        format: Says that it is one of these.
        version: Of the format.
        world: How many ranks wrote it.
        config: The resolved configuration, as JSON has it.
        contents: Digest of what each setting that names files or folders stood for.
        state: What the run was at.
        parts: What its parts remember, by their names.
        tensors: Every tensor by name.
        files: Every other file of the folder; a file that is not among them is never read.
    """

    format: Literal["mmscale-checkpoint"]
    version: Literal[2]
    world: Annotated[int, Field(gt=0, lt=2**31)]
    config: dict[str, Any]
    contents: dict[str, str]
    state: RunState
    parts: dict[str, dict[str, Any]]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _agrees(self) -> "State":
        state = self.state
        for name, value in {**vars(state), **vars(state.position)}.items():
            if isinstance(value, int) and not 0 <= value < 2**63:
                raise ValueError(f"state.{name}={value} is not a count")
        if state.over not in ("", "stage", "run"):
            raise ValueError(f"state.over={state.over!r} is neither `stage` nor `run`")
        if odd := next((name for name in self.files if not _PLAIN.fullmatch(name)), None):
            raise ValueError(f"files: {odd!r} is not the name of a file in the folder")
        ranks = [rank_file(rank, self.world) for rank in range(min(self.world, len(self.files)))]
        if self.world > len(self.files) or not set(ranks) <= set(self.files):
            raise ValueError(f"files does not hold a file of each of the {self.world} ranks")
        if any(record.rank >= self.world for record in self.tensors.values()):
            raise ValueError(f"tensors: one lies with a rank that is none of the {self.world}")
        return self


def rank_file(rank: int, world: int) -> str:
    """Name of what a rank wrote."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's `state.json` and, when that is on disk, its digest.

    Args:
        folder: Of the checkpoint.
        state: As `State` has it.
    """
    content = json.dumps(state, indent=1).encode()
    replace_file(folder / STATE, content)
    replace_file(folder / DIGEST, f"{hashlib.sha256(content).hexdigest()}  {STATE}\n".encode())


def read_state(folder: Path) -> State:
    """A checkpoint's `state.json`, which its digest and its schema say is whole.

    Raises:
        CheckpointError: It is not there, or not what was written.
    """
    content = _read(folder, STATE)
    try:
        digest = _read(folder, DIGEST)
    except CheckpointError:
        _refuse_older(folder, content)
        raise
    if digest != f"{hashlib.sha256(content).hexdigest()}  {STATE}\n".encode():
        raise CheckpointError(f"{folder / STATE}: not what was written (its sha256 is another)")
    _refuse_older(folder, content)
    try:
        state = State.model_validate_json(content, strict=True)
        _require_all_keys(json.loads(content)["state"])
    except ValueError as error:
        raise CheckpointError(
            f"{folder / STATE}: does not describe a checkpoint ({_told(error)})"
        ) from error
    return state


def _told(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _require_all_keys(state: dict[str, Any]) -> None:
    """A dataclass would take its default for what is missing."""
    _require_keys("state", state, RunState)
    _require_keys("state.position", state["position"], Position)
    if state["best"] is not None:
        _require_keys("state.best", state["best"], Best)


def _require_keys(place: str, value: dict[str, Any], kind: type) -> None:
    wanted = {each.name for each in fields(kind)}
    if wanted != set(value):
        raise ValueError(f"{place}: {', '.join(sorted(wanted ^ set(value)))} missing or unknown")


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.exists() and not path.is_file():
            # A pipe in its place would never be opened.
            raise CheckpointError(f"{path}: is not a file; {_NOT_ONE}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint ({name}: {error}); {_NOT_ONE}"
        ) from error


def _refuse_older(folder: Path, content: bytes) -> None:
    """Say so where the checkpoint is sound, but not of this version."""
    try:
        head = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(head, dict) and head.get("format") == FORMAT and head.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: has format version {head.get('version')!r}, this mmscale reads {VERSION}; "
            "go on with the mmscale that wrote it, or start another run.dir"
        )
