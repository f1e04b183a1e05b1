"""Signals that ask a run to end: noted here, acted on between two updates."""

import signal
from types import FrameType

_GRACE_SECONDS = 20


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 (a scheduler's early warning) from the moment it is made."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True


def outlive_termination(worker: int) -> None:
    """For a decoding process: stay while the training process ends its step and writes.

    Schedulers signal every process of a job at once, and a loader whose worker died cannot finish
    the batch. The delay is bounded: a training process that is gone also asks by SIGTERM.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))
