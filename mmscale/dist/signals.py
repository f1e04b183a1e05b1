"""Signals that ask a run to end: noted here, acted on between two updates."""

import os
import signal
from types import FrameType

from mmscale.dist.launchers import Launchers

_GRACE_SECONDS = 20


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 (a scheduler's early warning) from the moment it is made.

    The end of a launcher above this process counts as one: some end at SIGTERM without a word to
    their ranks.
    """

    def __init__(self) -> None:
        self._noted = False
        self._launchers = Launchers(os.getpid())
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    @property
    def wanted(self) -> bool:
        """The run is to end."""
        return self._noted or self._launchers.gone

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True


def outlive_termination(worker: int) -> None:
    """For a decoding process: stay while the training process ends its step and writes.

    Schedulers signal every process of a job at once, and a loader whose worker died cannot finish
    the batch. The delay is bounded: a training process that is gone also asks by SIGTERM.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))
