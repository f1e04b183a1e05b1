"""Checkpoints while training goes on: ranks write in the background and agree when all have."""

import errno
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError

from mmscale.checkpoint.files import PARTIAL, step_folder
from mmscale.checkpoint.write import (
    Snapshot,
    drop_for_room,
    prune,
    publish_if_whole,
    write_share,
)
from mmscale.config.schema import CheckpointConfig
from mmscale.contracts import World
from mmscale.errors import CheckpointError, HaltError
from mmscale.parallel.peers import broadcast_object, gather_objects


@dataclass(frozen=True)
class _Fault:
    """Why a checkpoint is not there.

    Attributes:
        text: In words, with the rank.
        no_room: The disk is full, or the user's share of it.
        not_finite: It would have held weights that are not finite.
    """

    text: str
    no_room: bool = False
    not_finite: bool = False

    @classmethod
    def of(cls, rank: int, error: Exception) -> "_Fault":
        """The fault that an error of a rank is."""
        text = str(error)
        # Safetensors tells the system's error in words only.
        full = any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))
        return cls(f"rank {rank}: {text}", full, isinstance(error, HaltError))


# Whether the checkpoint of a step is one of those that `checkpoint.keep` counts.
Counts: TypeAlias = Callable[[int], bool]


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is being written."""

    folder: Path
    snapshot: Snapshot
    counts: Counts
    written: "Future[None]"

    @property
    def aside(self) -> Path:
        return self.folder.with_suffix(PARTIAL)

    def fault(self) -> _Fault | None:
        """What kept this rank from writing; waits for the end of it."""
        try:
            self.written.result()
        except (OSError, SafetensorError, HaltError) as error:
            return _Fault.of(self.snapshot.rank, error)
        return None


class Saver:
    """Writes a run's checkpoints, one at a time. Ranks call it alike.

    Args:
        run_dir: The run's folder.
        world: The ranks.
        settings: How many stay, and how many failures are borne.
        warn: Takes a line about a checkpoint that could not be written.
    """

    def __init__(
        self, run_dir: Path, world: World, settings: CheckpointConfig, warn: Callable[[str], None]
    ):
        self._run_dir, self._world, self._settings, self._warn = run_dir, world, settings, warn
        # One thread, so that what is pruned has been published.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight: _Flight | None = None
        self._fault: CheckpointError | None = None
        self._failures = 0

    @property
    def written(self) -> bool:
        """This rank has done its part of the checkpoint in flight, or failed to."""
        return self._flight is not None and self._flight.written.done()

    def save(self, snapshot: Snapshot, counts: Counts = lambda step: True) -> None:
        """Start to write; the one in flight is brought to its end first. Collective.

        Args:
            snapshot: What is written.
            counts: Those that count are kept whatever is written between them, so that a run which
                was stopped has them when the same run without a stop would.

        Raises:
            CheckpointError: As `settle`.
            HaltError: As `settle`.
        """
        self._land()
        self._start(snapshot, counts)

    def settle(self) -> None:
        """Wait until the checkpoint in flight is written everywhere, and publish it. Collective.

        One that had no room is written anew after the oldest have made some.

        Raises:
            CheckpointError: It could not be written, nor as many before it as are borne.
            HaltError: The run's weights are not finite.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        fault = self._agreed(flight.fault()) or self._agreed(self._publish(flight))
        if fault is None:
            self._failures, self._fault = 0, None
            return
        if self._world.is_main:
            shutil.rmtree(flight.aside, ignore_errors=True)
        if fault.not_finite:
            raise HaltError(
                f"{flight.folder}: not written, since {fault.text}; go on from the checkpoint "
                "before it with a lower optim.lr"
            )
        if fault.no_room and self._made_room(flight):
            self._start(flight.snapshot, flight.counts)
        else:
            self._failed(flight.folder, fault)

    def finish(self) -> None:
        """Bring the last checkpoint to its end. Collective.

        Raises:
            CheckpointError: It could not be written.
            HaltError: The run's weights are not finite.
        """
        self._land()
        self._thread.shutdown()
        if self._fault is not None:
            raise self._fault

    def _land(self) -> None:
        while self._flight is not None:
            self.settle()

    def _start(self, snapshot: Snapshot, counts: Counts) -> None:
        folder = step_folder(self._run_dir, snapshot.run.step)
        fault = self._agreed(self._make_aside(folder.with_suffix(PARTIAL)))
        if fault:
            self._failed(folder, fault)
            return
        task = self._thread.submit(write_share, snapshot, folder.with_suffix(PARTIAL))
        self._flight = _Flight(folder, snapshot, counts, task)

    def _made_room(self, flight: _Flight) -> bool:
        snapshot, removed = flight.snapshot, []
        needed = sum(gather_objects(self._world, snapshot.bytes))
        if self._world.is_main:
            with suppress(OSError):
                step = snapshot.run.step
                removed = drop_for_room(self._run_dir, step, snapshot.others_kept, needed)
        removed = broadcast_object(self._world, removed)
        if removed:
            self._warn(
                f"{flight.folder.name} had no room; {', '.join(removed)} made some, and it is "
                "written anew: lower checkpoint.keep or free disk space"
            )
        return bool(removed)

    def wait(self, seconds: float) -> None:
        """Let this rank's part be written; with all parts there, the next start publishes it."""
        if self._flight is not None:
            wait([self._flight.written], seconds)

    def _make_aside(self, aside: Path) -> _Fault | None:
        if not self._world.is_main:
            return None
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        except OSError as error:
            return _Fault.of(0, error)
        return None

    def _publish(self, flight: _Flight) -> _Fault | None:
        if not self._world.is_main:
            return None
        try:
            if publish_if_whole(flight.aside) is None:
                return _Fault(f"rank 0 does not see what the others wrote to {flight.aside}")
        except OSError as error:
            return _Fault.of(0, error)
        snapshot = flight.snapshot
        self._thread.submit(self._prune, snapshot.run.step, flight.counts, snapshot.others_kept)
        return None

    def _prune(self, step: int, counts: Counts, others: Collection[int]) -> None:
        try:
            prune(self._run_dir, step, self._settings.keep, counts, others)
        except OSError as error:
            self._warn(f"an old checkpoint could not be removed ({error})")

    def _agreed(self, fault: _Fault | None) -> _Fault | None:
        """The first rank's fault, on every rank."""
        faults = gather_objects(self._world, fault and asdict(fault))
        return next((_Fault(**fault) for fault in faults if fault), None)

    def _failed(self, folder: Path, fault: _Fault) -> None:
        self._failures += 1
        self._fault = CheckpointError(
            f"{folder}: could not be written ({fault.text}), {self._failures} in a row; free disk "
            "space and go on from the checkpoint before it"
        )
        if self._failures > self._settings.failures:
            raise self._fault
        self._warn(
            f"{folder.name} could not be written ({fault.text}); earlier checkpoints are "
            "untouched and training goes on, the next one is tried when it is due: failure "
            f"{self._failures} in a row of the {self._settings.failures} that checkpoint.failures "
            "bears"
        )
