"""An ordered map over processes that end with the process that started them."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from mmscale.errors import LaunchError

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def map_ordered(
    work: Callable[[Item], Outcome], items: Iterable[Item], workers: int
) -> Iterator[Outcome]:
    """`work` of every item in the items' order; one worker is this process itself.

    Raises:
        LaunchError: A worker was killed.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=_end_with_parent)
    try:
        yield from pool.map(work, items)
    except BrokenProcessPool as error:
        raise LaunchError(
            f"one of workers={workers} processes was killed, likely for memory; "
            "give fewer and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent and end with it: an orphan would write beside its successor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = parent_process()
    assert parent is not None, "runs in workers only"
    wait([parent.sentinel])
    os._exit(1)
