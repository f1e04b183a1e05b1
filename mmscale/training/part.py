"""The lifecycle of whatever is optional in a run: one file a part, one order, its own state.

The order of a run's parts is the order of their collectives: it is the same on every rank, and
ranks compare it at the start. What a part remembers it gives to every checkpoint and takes back
from it; nothing else is remembered anywhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.state import RunState
from mmscale.contracts import Batch, Features, LossInput, NamedTensor, StepRecord

Json: TypeAlias = Any


@dataclass(frozen=True)
class Step:
    """One update to come.

    Attributes:
        state: What the run is at before it.
        lr: Base learning rate times `factor`, for the record.
        factor: Factor of every parameter group's rate.
        stop: This rank was told to stop.
        written: This rank has done its part of the checkpoint in flight.
        is_measured: Floors and chance values of the terms are wanted.
        is_logged: It has a line in the log.
        waits: A part acts right after it: the next update is not begun before its record is here.
    """

    state: RunState
    lr: float = 0.0
    factor: float = 1.0
    stop: bool = False
    written: bool = False
    is_measured: bool = True
    is_logged: bool = False
    waits: bool = False

    @property
    def number(self) -> int:
        """Batches that its stage has taken before it."""
        return self.state.step - self.state.stage_start


@dataclass(frozen=True)
class StepResult:
    """What an update gave.

    Attributes:
        record: Figures of the global batch, equal on every rank.
        rows: What the objective saw of this rank's rows, without a graph.
        batch: This rank's rows, without pixels.
        overtaken: The update after it was launched before its record arrived: the weights are no
            longer those that it left. Never where a part said that it `waits` for the update.
    """

    record: StepRecord
    rows: LossInput
    batch: Batch
    overtaken: bool = False


@dataclass(frozen=True)
class StageOver:
    """The stage, or the whole run, ends as if complete."""

    what: Literal["stage", "run"]


@dataclass(frozen=True)
class Rollback:
    """The run goes on with the weights of an earlier checkpoint, and the data after this batch."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class Halt:
    """The run ends with exit code 3, after a checkpoint of what it is at."""

    sentence: str


Event: TypeAlias = StageOver | Rollback | Halt


class Part:
    """Something optional in a run; each method does nothing unless a part says otherwise.

    Attributes:
        name: In checkpoints; its tensors are named `NAME.*` there.
        lasts: Whether what it remembers outlives a stage.
        has_tensors: It takes tensors back from a checkpoint.
        reads_tokens: `inputs` wants both towers' token sequences.
        follows_on_device: `follow` takes a third argument: a flag on the device that says whether
            the update was applied, or None where it was. Where a part follows without it, every
            update waits until the host knows.
    """

    name: ClassVar[str]
    lasts: ClassVar[Literal["stage", "run"]] = "stage"
    has_tensors: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False
    follows_on_device: bool = False

    @property
    def may_follow_unasked(self) -> bool:
        """Whether an update can go on to the next before the host knows if it was applied."""
        return self.follows_on_device or type(self).follow is Part.follow

    def begin(self, state: RunState) -> Event | None:
        """Before the first update of a stage that begins or resumes. Collective.

        Returns:
            What the run does next, where what a stop left undone decides it.
        """
        return None

    def rate(self) -> float:
        """A factor of every learning rate."""
        return 1.0

    def measures(self, state: RunState) -> bool:
        """Whether it looks at the floors and chance values of the coming update."""
        return False

    def waits(self, state: RunState) -> bool:
        """Whether it looks at the weights, or acts, right after the coming update."""
        return False

    def before(self, step: Step, batch: Batch) -> None:
        """Before an update's forward. Collective."""

    def beside(self, step: Step) -> Mapping[str, Batch]:
        """Rows that pass the model beside the batch's; `LossInput.beside` has them by their name.

        As many on every rank, fed as the batch is, on the device.
        """
        return {}

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        """Add what the objective needs to this rank's rows. Collective.

        Args:
            rows: The rows' embeddings, with a graph, and what parts before this one have added.
            features: Both towers' outputs.
            batch: This rank's rows.
        """
        return rows

    def pull(self, step: Step) -> None:
        """After an update's last backward: add to the engine's own shares of the gradient."""

    def follow(self, rows: LossInput, batch: Batch, applied: Tensor | None = None) -> None:
        """After an update was applied: work on the device, without waiting for it. Collective.

        Args:
            rows: As the objective saw them, without a graph and without the bank.
            batch: This rank's rows.
            applied: With `follows_on_device`: whether it was, where only the device knows.
        """

    def observe(self, result: StepResult, state: RunState) -> Event | None:
        """On the host, when the update's record has arrived. Collective.

        Args:
            result: What the update gave.
            state: What the run is at after it.

        Returns:
            What the run does next, equal on every rank; None to go on.
        """
        return None

    def figures(self) -> Mapping[str, float]:
        """What it adds to a training line."""
        return {}

    def state(self) -> dict[str, Json]:
        """What it remembers, as JSON."""
        return {}

    def load(self, state: Mapping[str, Json]) -> None:
        """Take back what `state` gave."""

    def tensors(self) -> Iterator[NamedTensor]:
        """What it remembers, as tensors named `NAME.*`, whole and in an order equal on all ranks.

        Collective.
        """
        yield from ()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave, by what follows `NAME.`; with `has_tensors` only."""

    def close(self) -> None:
        """Free what it holds."""
