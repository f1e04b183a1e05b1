"""Progress of long work on stderr: a bar with rate and time left, or a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines where stderr is a file


class _RateColumn(ProgressColumn):
    """Items a second of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


@contextmanager
def progress_of(verb: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function that is called with what is done and how much there is.

    Args:
        verb: What happens to the items, such as `packed`.
        console: Where to write; default stderr.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _plain(verb, console)
        return
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    # Shards end seconds apart: the rate is that of the last minutes, not of the last two.
    with Progress(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(verb: str, console: Console) -> Callable[[int, int], None]:
    start = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done < total and now - told < PLAIN_SECONDS:
            return
        told = now
        rate = done / max(now - start, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if 0 < done < total else ""
        line = f"{verb} {done:,} of {total:,}, {rate:,.1f}/s{left}"
        console.print(line, highlight=False, markup=False)

    return tell
