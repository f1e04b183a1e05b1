"""What is built for a stage of a run; a run without stages has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmscale.checkpoint.exported import ExportFolder
from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import RunState
from mmscale.checkpoint.write import Kept
from mmscale.config.evaluation import MAIN
from mmscale.config.schema import Config
from mmscale.config.values import Duration
from mmscale.contracts import InputSpec, Peers, World
from mmscale.data.features import CachedStream
from mmscale.data.schedule import Schedule
from mmscale.data.shards import ShardSet
from mmscale.data.stream import TrainStream
from mmscale.engine.footprint import Flops
from mmscale.engine.plan import BatchPlan
from mmscale.evaluation.encoded import EvalSet, HeldOut
from mmscale.parallel.device import DevicePolicy
from mmscale.parallel.failure import Watchdog
from mmscale.parallel.signals import StopSignal
from mmscale.report.report import Report
from mmscale.training.step import Learner
from mmscale.training.teachers import Teacher


@dataclass(frozen=True)
class Job:
    """What all stages of a run share.

    Attributes:
        config: The run's, with all that is left to presets and to what is there.
        stages: The configuration of each stage; at least one.
        plans: How each stage's batch is cut.
        kind: Of engine: `deepspeed` or `accelerate`.
        schedule: The order of the first stage's data, without a table of neighbours.
        lengths: Batches of each stage.
        kept: What every checkpoint holds alike.
        source: The checkpoint that the run goes on from, or begins with the weights of.
    """

    config: Config
    stages: tuple[Config, ...]
    plans: tuple[BatchPlan, ...]
    kind: str
    policy: DevicePolicy
    world: World
    peers: Peers
    shards: ShardSet
    schedule: Schedule
    lengths: tuple[int, ...]
    kept: Kept
    source: Checkpoint | None

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Start:
    """Where a stage begins.

    Attributes:
        state: What the run is at.
        parts: What its parts remember, by name.
        checkpoint: What tensors are taken from: the run goes on, or back.
        weights: The model's tensors as the stage before left them, in their place.
        first_weights: A checkpoint or export of another run, whose weights this one begins with.
        draws_heads: Those weights without their heads, which are drawn and fitted as in any run.
        begun: The weights that the run began with, where a term stays near them.
    """

    state: RunState
    parts: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    weights: Mapping[str, Tensor] | None = None
    first_weights: Checkpoint | ExportFolder | None = None
    draws_heads: bool = False
    begun: Mapping[str, Tensor] | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether the model begins with the weights of its towers, and new heads."""
        return self.checkpoint is None and self.weights is None and self.first_weights is None


@dataclass(frozen=True)
class Services:
    """What a run talks to: log and console, signals, the disk, and the watch over its ranks."""

    report: Report
    stop: StopSignal
    saver: Saver
    watchdog: Watchdog


@dataclass(frozen=True)
class Timetable:
    """Durations of a stage in batches.

    Attributes:
        epoch_steps: Batches of an epoch.
        global_rows: Rows of a batch over all ranks.
        total_steps: `RunState.step` at which the run ends.
    """

    epoch_steps: int
    global_rows: int
    total_steps: int

    def steps(self, duration: Duration) -> int:
        """A duration in batches, at least one, cut to the run's length."""
        return max(1, min(self.uncut(duration), self.total_steps))

    def uncut(self, duration: Duration) -> int:
        """A duration in batches."""
        return duration.steps(self.epoch_steps, self.global_rows)

    def is_kept(self, every: Duration | None, step: int) -> bool:
        """Whether `checkpoint.keep` counts the checkpoint of `step`: not one that a stop left.

        Where none is ever due, all of them count.
        """
        return every is None or self.is_due(every, step)

    def is_due(self, every: Duration | None, step: int) -> bool:
        """Whether something that happens every so often happens after `step`."""
        return every is not None and step % self.steps(every) == 0


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one configuration, model and engine.

    Attributes:
        config: The stage's.
        follower: Becomes the momentum encoder, where one is wanted.
        teachers: Frozen models that its terms name; the run's start where any stage's terms do.
        sets: What it is evaluated on, by name.
        start: Where it begins.
        end: `RunState.step` at which it ends.
    """

    job: Job
    config: Config
    plan: BatchPlan
    learner: Learner
    follower: nn.Module | None
    teachers: tuple[Teacher, ...]
    stream: TrainStream | CachedStream
    spec: InputSpec
    sets: Mapping[str, EvalSet]
    flops: Flops | None
    timetable: Timetable
    start: Start
    end: int

    @property
    def held_out(self) -> HeldOut | None:
        """The pairs of `data.eval`, by which the run is judged and shown."""
        main = self.sets.get(MAIN)
        return main if isinstance(main, HeldOut) else None
