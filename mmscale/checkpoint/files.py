"""The one checkpoint format: safetensors, a file a rank, and `state.json`.

Tensors are whole and named, each held by one rank's file, so world, ZeRO stage and engine may
change between save and load. A folder is written aside and renamed when everything is on disk.
Every file that is ever read is verified by its digest first; others in the folder are left alone.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmscale.checkpoint.state import FileRecord, State, rank_file, read_state
from mmscale.config.load import validate
from mmscale.config.rules import expanded_stages
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.adapters import below_adapter, is_adapters
from mmscale.parallel.peers import broadcast_object, gather_objects

# Tensors that are not the model's: those of the data's order, and each part's under its name.
_OF_THE_ORDER = "hard_batches."
_MOMENTUM = "momentum."
# How the names of the heads' tensors begin, and that of the scale's bound.
HEADS, BOUND = "head.", "scale.log_bound"
# Suffix of a folder that is being written.
PARTIAL = ".partial"


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def best_blend(run_dir: Path) -> Path:
    """Where the best point between a run's first and its last weights lies."""
    return run_dir / "best"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def step_folders(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


class Checkpoint:
    """A checkpoint on disk, verified when opened.

    Attributes:
        folder: Where it lies.
        config: The run's configuration, presets filled.
        contents: Digest of what each setting that names files or folders stood for.
        world: How many ranks wrote it.
        tensors: Every tensor by name.
        files: Names of what lies in it besides the ranks' files.
        state: What the run was at.
        parts: What its parts remember, by their names.
    """

    def __init__(self, folder: Path, readers: World | None = None):
        """Open and verify.

        Args:
            folder: Of the checkpoint.
            readers: Ranks that verify a share of the files each; default all files here.

        Raises:
            CheckpointError: Not a checkpoint, or not what was written.
        """
        self.folder = folder
        state = read_state(folder)
        self._verify(state.files, readers or World())
        self.config = self._configuration(state)
        self.contents = state.contents
        self.world = state.world
        self.tensors = state.tensors
        self.files = sorted(
            set(state.files) - {rank_file(r, self.world) for r in range(self.world)}
        )
        self.state = state.state
        self.parts = state.parts

    def _configuration(self, state: State) -> Config:
        try:
            config = validate(state.config)
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder}: its configuration is none of this mmscale: "
                f"{'; '.join(str(error).splitlines())}"
            ) from error
        if state.state.stage >= max(1, len(expanded_stages(config))):
            raise CheckpointError(
                f"{self.folder}: is in stage {state.state.stage} of a run without it"
            )
        return config

    def _verify(self, files: Mapping[str, FileRecord], readers: World) -> None:
        for name in sorted(files)[readers.rank :: readers.size]:
            path, wanted = self.folder / name, files[name]
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is not whole")
            try:
                whole = path.stat().st_size == wanted.bytes and FileRecord.of(path) == wanted
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from error
            if not whole:
                raise CheckpointError(f"{path}: not what was written (its sha256 is another)")

    def attached(self, name: str) -> bytes:
        """A file that lies beside the tensors, one of `files`."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({error})") from error

    def read(self, kind: str, name: str) -> Tensor:
        """One tensor: `value` or a moment.

        Raises:
            CheckpointError: The file does not hold it.
        """
        record = self.tensors[name]
        with self._tensors_of(record.rank) as file:
            tensor: Tensor = file.get_tensor(f"{kind}/{name}")
        if tuple(tensor.shape) != record.shape:
            raise CheckpointError(
                f"{self.folder}: {kind}/{name} is {list(tensor.shape)}, but state.json says "
                f"{list(record.shape)}"
            )
        return tensor

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer state of a parameter; empty for one that was not trained."""
        record = self.tensors.get(name)
        return {key: self.read(key, name) for key in (record.moments if record else ())}

    def random(self, rank: int) -> dict[str, Tensor]:
        """Random state of a rank; empty where that rank did not exist."""
        if rank >= self.world:
            return {}
        with self._tensors_of(rank) as file:
            names = [name for name in file.keys() if name.startswith("rng/")]  # noqa: SIM118
            return {name.removeprefix("rng/"): file.get_tensor(name) for name in names}

    @contextmanager
    def _tensors_of(self, rank: int) -> Iterator[Any]:
        path = self.folder / rank_file(rank, self.world)
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: does not hold what state.json says ({error})"
            ) from error

    def load_weights(self, model: nn.Module, but: tuple[str, ...] = ()) -> None:
        """Fill the model's parameters and buffers.

        Of a model with adapters only what is below them, where the checkpoint has none.

        Args:
            model: To fill.
            but: Tensors whose names begin so keep what they are.

        Raises:
            CheckpointError: The model is another; names the first differing tensors.
        """
        others = (_OF_THE_ORDER, *(f"{part}." for part in self.parts))
        theirs = [name for name in self.tensors if not name.startswith(others)]
        own = model.state_dict()
        if not any(is_adapters(name) for name in theirs):
            own = below_adapters(own)
        self._fill(own, theirs, "", but)

    def load_momentum(self, own: Mapping[str, Tensor]) -> None:
        """Fill what the momentum encoder averages, by the names that the model has for it.

        Raises:
            CheckpointError: There is none, or that of another model.
        """
        names = [name for name in self.tensors if name.startswith(_MOMENTUM)]
        self._fill(own, names, _MOMENTUM)

    def tensors_of(self, part: str) -> dict[str, Tensor]:
        """Tensors named `PART.*`, by what follows the dot.

        Raises:
            CheckpointError: There are none.
        """
        prefix = f"{part}."
        names = [name for name in self.tensors if name.startswith(prefix)]
        if not names:
            raise CheckpointError(f"{self.folder}: holds no {prefix}*; start another run.dir")
        return {name.removeprefix(prefix): self.read("value", name) for name in names}

    def _fill(
        self, own: Mapping[str, Tensor], names: list[str], prefix: str, but: tuple[str, ...] = ()
    ) -> None:
        shapes = {name.removeprefix(prefix): self.tensors[name].shape for name in names}
        origin = f"{self.folder}: a checkpoint"
        fill(own, shapes, lambda name: self.read("value", prefix + name), origin, but)


def fill(
    own: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    origin: str,
    but: tuple[str, ...] = (),
) -> None:
    """Give tensors the values that others of the same names have.

    Args:
        own: The tensors, in their place.
        shapes: Of the others.
        read: One of the others by its name.
        origin: What they are of, for the message.
        but: Tensors whose names begin so are left as they are.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    own = {name: tensor for name, tensor in own.items() if not name.startswith(but)}
    theirs = {name: shape for name, shape in shapes.items() if not name.startswith(but)}
    faults = {}
    for name, tensor in own.items():
        if name not in theirs:
            faults[name] = f"{name} is missing there"
        elif theirs[name] != tuple(tensor.shape):
            faults[name] = f"{name} is {list(theirs[name])} there, {list(tensor.shape)} here"
    faults |= {name: f"{name} is unknown here" for name in theirs if name not in own}
    if faults:
        repair = "build the model that it was saved from"
        if all(name.startswith(HEADS) for name in faults):
            repair += ", or set model.head.weights=random, which draws its heads anew"
        raise CheckpointError(
            f"{origin} of another architecture: {len(faults)} tensors differ "
            f"({'; '.join(list(faults.values())[:5])}); {repair}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(read(name))


def below_adapters(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by the names that they have without adapters, and none of these."""
    return {below_adapter(name): own[name] for name in own if not is_adapters(name)}


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
    fault = next((fault for fault in gather_objects(world, fault) if fault), None)
    if opened is None or fault:
        raise CheckpointError(str(fault))
    return opened


def _warn(text: str) -> None:
    sys.stderr.write(f"mmscale: {text}\n")


def newest_sound(
    run_dir: Path,
    world: World,
    warn: Callable[[str], None] = _warn,
    wanted: Callable[[int], bool] = lambda step: True,
) -> Checkpoint | None:
    """The newest checkpoint that verifies, agreed by all ranks; None without any. Collective.

    Args:
        run_dir: The run's folder.
        world: The ranks; which checkpoints there are is what rank 0 sees.
        warn: Takes a line about each one that is passed over.
        wanted: Whether that of a step will do.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
    """
    found = step_folders(run_dir) if world.is_main else []
    names = broadcast_object(world, [str(path) for path in found if wanted(step_of(path))])
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
