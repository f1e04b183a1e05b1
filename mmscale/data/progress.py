"""How far something is, in lines, where nobody watches a terminal."""

import time
from collections.abc import Callable

# Between two lines.
PROGRESS_SECONDS = 10.0


def progress_lines(verb: str, tell: Callable[[str], None]) -> Callable[[int, int], None]:
    """A function that is called with what is done and how much there is, and tells now and then.

    Args:
        verb: What happens to the items, such as `packed`.
        tell: Takes a line, with the rate and the time left.
    """
    start = told = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done < total and now - told < PROGRESS_SECONDS:
            return
        told = now
        rate = done / max(now - start, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if 0 < done < total else ""
        tell(f"{verb} {done:,} of {total:,}, {rate:,.1f}/s{left}")

    return advance
