"""A rank that makes no progress ends all of them, each telling where it stands."""

import sys
import threading
import time
from types import TracebackType

from mmscale.contracts import World
from mmscale.errors import LaunchError
from mmscale.parallel.failure import first_failure, tell_stacks
from mmscale.parallel.signals import end_now

_LOOKS_A_SPAN = 20
# A rank in an exchange most likely waits for one that stands still elsewhere: it is heard first.
_LET_OTHERS_SPEAK, _LET_OTHERS_SPEAK_SECONDS = 0.25, 5.0


class Watchdog:
    """Looks after a rank between `with` and its end.

    A thread of its own tells what the main thread cannot: that it waits for a batch that does not
    come, or in an exchange for a rank that has gone astray. Named is who stood still first, and
    between a rank in an exchange and one that never came to it, the latter.

    Args:
        world: The ranks.
        seconds: How long a rank may stand still.
    """

    def __init__(self, world: World, seconds: float):
        self._world, self._seconds = world, seconds
        self._over = threading.Event()

    def alive(self, doing: str, in_exchange: bool = False) -> None:
        """This rank has come to something new.

        Args:
            doing: What it is, told where the rank stays there.
            in_exchange: It includes waiting for other ranks.
        """
        patience = self._seconds
        if in_exchange and self._world.size > 1:
            patience += min(_LET_OTHERS_SPEAK * self._seconds, _LET_OTHERS_SPEAK_SECONDS)
        self._now = (time.monotonic() + patience, doing)

    def __enter__(self) -> "Watchdog":
        self.alive("its beginning")
        self._over = threading.Event()
        threading.Thread(target=self._look, args=(self._over,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _look(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self._seconds / _LOOKS_A_SPAN)):
            deadline, doing = self._now
            if time.monotonic() > deadline:
                self._end(doing)

    def _end(self, doing: str) -> None:
        rank = self._world.rank
        message = (
            f"rank {rank} stood still for {self._seconds:g} s (engine.timeout) in {doing}; stderr "
            "of each rank holds its stacks"
        )
        tell_stacks(rank)
        first = first_failure(self._world, LaunchError.exit_code, message, stacks=True)
        sys.stderr.write(f"mmscale: {first}\n")
        sys.stderr.flush()
        end_now(LaunchError.exit_code)
