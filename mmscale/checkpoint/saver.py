"""Checkpoints while training goes on: ranks write in the background and agree when all have."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from mmscale.checkpoint.files import PARTIAL, step_folder
from mmscale.checkpoint.write import Snapshot, prune, publish_if_whole, write_share
from mmscale.config.schema import CheckpointConfig
from mmscale.contracts import World
from mmscale.dist.peers import from_all
from mmscale.errors import CheckpointError


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is being written."""

    folder: Path
    snapshot: Snapshot
    written: "Future[None]"

    @property
    def aside(self) -> Path:
        return self.folder.with_suffix(PARTIAL)

    def fault(self) -> str | None:
        """What kept this rank from writing; waits for the end of it."""
        try:
            self.written.result()
        except (OSError, SafetensorError) as error:
            return f"rank {self.snapshot.rank}: {error}"
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

    def save(self, snapshot: Snapshot) -> None:
        """Start to write; the one in flight is brought to its end first. Collective.

        Raises:
            CheckpointError: As `settle`.
        """
        self.settle()
        folder = step_folder(self._run_dir, snapshot.progress.step)
        fault = self._agreed(self._make_aside(folder.with_suffix(PARTIAL)))
        if fault:
            self._failed(folder, fault)
            return
        task = self._thread.submit(write_share, snapshot, folder.with_suffix(PARTIAL))
        self._flight = _Flight(folder, snapshot, task)

    def settle(self) -> None:
        """Wait until the checkpoint in flight is written everywhere, and publish it. Collective.

        Raises:
            CheckpointError: It could not be written, nor as many before it as are borne.
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
        self._failed(flight.folder, fault)

    def finish(self) -> None:
        """Bring the last checkpoint to its end. Collective.

        Raises:
            CheckpointError: It could not be written.
        """
        self.settle()
        self._thread.shutdown()
        if self._fault is not None:
            raise self._fault

    def wait(self, seconds: float) -> None:
        """Let this rank's part be written; with all parts there, the next start publishes it."""
        if self._flight is not None:
            wait([self._flight.written], seconds)

    def _make_aside(self, aside: Path) -> str | None:
        if not self._world.is_main:
            return None
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        except OSError as error:
            return f"rank 0: {error}"
        return None

    def _publish(self, flight: _Flight) -> str | None:
        if not self._world.is_main:
            return None
        try:
            if publish_if_whole(flight.aside) is None:
                return f"rank 0 does not see what the others wrote to {flight.aside}"
        except OSError as error:
            return f"rank 0: {error}"
        progress = flight.snapshot.progress
        best = None if progress.best is None else progress.best.step
        self._thread.submit(self._prune, progress.step, best)
        return None

    def _prune(self, step: int, best_step: int | None) -> None:
        try:
            prune(self._run_dir, step, self._settings.keep, best_step)
        except OSError as error:
            self._warn(f"an old checkpoint could not be removed ({error})")

    def _agreed(self, fault: str | None) -> str | None:
        """The first rank's fault, on every rank."""
        return next((fault for fault in from_all(self._world, fault) if fault), None)

    def _failed(self, folder: Path, fault: str) -> None:
        self._failures += 1
        self._fault = CheckpointError(
            f"{folder}: could not be written ({fault}), {self._failures} in a row; free disk space "
            "and go on from the checkpoint before it"
        )
        if self._failures > self._settings.failures:
            raise self._fault
        self._warn(
            f"{folder.name} could not be written ({fault}); earlier checkpoints are untouched and "
            f"training goes on: failure {self._failures} in a row of the "
            f"{self._settings.failures} that checkpoint.failures bears"
        )
