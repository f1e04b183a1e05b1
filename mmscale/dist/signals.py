"""Signals that ask a run to end: noted here, acted on between two updates."""

import signal
from types import FrameType


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 (a scheduler's early warning) from the moment it is made."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
