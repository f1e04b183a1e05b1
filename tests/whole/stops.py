"""Lives of a run that end at a step of the test's choice."""

import os
import signal
from collections.abc import Callable

from mmscale.contracts import Batch
from mmscale.engine import feed
from mmscale.train import main


def live_until(
    words: list[str],
    first: int,
    stop_at: int | None,
    altered: Callable[[Batch, int], Batch] = lambda batch, step: batch,
) -> int:
    """One life of a run in this process, which must be its own; returns the exit code.

    Args:
        words: The run's.
        first: The step that it goes on after.
        stop_at: SIGTERM comes when the batch of this step lies on the device, so that the
            checkpoint of that step is the last thing the life does.
        altered: What becomes of the batch of a step.
    """
    place, step = feed.on_device, first

    def on_device(batch: Batch, *where) -> Batch:
        nonlocal step
        step += 1
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(altered(batch, step), *where)

    feed.on_device = on_device
    return main(words)
