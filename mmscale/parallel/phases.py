"""Where an update's time goes: its phases, on the device's own clock, or a trace of all it does.

A phase within another one interrupts it, so that seconds add up. On an accelerator the stamps are
events of its stream: nothing waits until they are read, and an update that is not timed has none.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import profile, record_function, schedule

PHASES = ("forward", "loss", "backward", "communication", "optimizer")

_running: "PhaseClock | None" = None


class PhaseClock:
    """Seconds by phase of one update."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stamps: list[tuple[Any, str | None]] = []

    @contextmanager
    def timing(self, wanted: bool) -> Iterator[None]:
        """Time what happens within, if `wanted`."""
        global _running
        if not wanted:
            yield
            return
        _running = self
        try:
            yield
        finally:
            _running = None

    def enter(self, name: str | None) -> str | None:
        """From here on it is phase `name`; returns what it was."""
        before = self._stamps[-1][1] if self._stamps else None
        self._stamps.append((self._stamp(), name))
        return before

    def _stamp(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """By phase; what none claims is left out. Waits for the device."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._stamps and self._device.type != "cpu":
            self._stamps[-1][0].synchronize()
        for (start, name), (end, _) in zip(self._stamps, self._stamps[1:], strict=False):
            if name is not None:
                on_host = isinstance(start, float)
                seconds[name] += end - start if on_host else start.elapsed_time(end) / 1000
        return seconds


@contextmanager
def phase(name: str) -> Iterator[None]:
    """One of `PHASES`; nothing where no update is timed. Traces show it by its name."""
    clock = _running
    if clock is None:
        yield
        return
    with record_function(name):
        before = clock.enter(name)
        try:
            yield
        finally:
            clock.enter(before)


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
