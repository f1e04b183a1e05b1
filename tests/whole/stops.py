"""Lives of a run that end at a step of the test's choice."""

import os
import signal
from collections.abc import Callable

from mmscale.contracts import Batch
from mmscale.engine import feed
from mmscale.train import main
from mmscale.training import loop
from mmscale.training.part import Step


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
    place, coming = feed.on_device, loop._next_step
    batches = steps = first

    def on_device(batch: Batch, *where) -> Batch:
        nonlocal batches
        batches += 1
        return place(altered(batch, batches), *where)

    def next_step(*what) -> Step:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return coming(*what)

    feed.on_device, loop._next_step = on_device, next_step
    return main(words)
