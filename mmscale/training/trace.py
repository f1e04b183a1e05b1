"""A trace of some updates by torch.profiler, written once by the main rank."""

from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import profile, schedule

# Updates before the first that is traced: the first ones compile, allocate and read ahead.
SETTLING, WARM = 2, 1
NAME = "profile.json.gz"


class Trace:
    """Does nothing where `log.profile` is not set, and on every rank but the main one."""

    def __init__(self, folder: Path | None, steps: int | None):
        """Prepare.

        Args:
            folder: Of the run; None on every rank but the main one.
            steps: `log.profile` in updates.
        """
        self._profile: Any = None
        if steps is not None and folder is not None:
            path = folder / NAME
            self._profile = profile(
                schedule=schedule(wait=SETTLING, warmup=WARM, active=steps, repeat=1),
                on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
                profile_memory=True,
            )

    def __enter__(self) -> "Trace":
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """An update is through."""
        if self._profile is not None:
            self._profile.step()
