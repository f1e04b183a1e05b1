"""How ranks fail together: each tells the first cause, none waits for one that is gone or stuck.

A failing rank posts its sentence in the rendezvous store and enters no further collective.
"""

import faulthandler
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch.distributed as dist

from mmscale.contracts import World
from mmscale.errors import LaunchError, explained, gist, told
from mmscale.parallel import lifeline
from mmscale.parallel.signals import end_now

_NOTICE = "mmscale/failure"
_READ = "mmscale/failure-read"
_NOTICE_SECONDS = 5.0
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 2.0
_LAST_WAIT_SECONDS = 15.0
_LEAVE_SECONDS = 5.0
_WORD_SECONDS = 1.0
_LOST = (
    "rank {} lost its connection to another rank, which ended without a word ({}); look for a rank "
    "that was killed or ran out of memory"
)

_GONE = (
    "rank {} ended without a word; look for a process that was killed or ran out of memory, or a "
    "machine that was lost"
)
_STORE_GONE = (
    "rank 0, or the launcher that the ranks met in, ended without a word; look for a process that "
    "was killed or ran out of memory, or a machine that was lost"
)

# Set while this rank handles a failure itself, or has parted from the others.
_handled = threading.Event()
_store: "dist.Store | None" = None
# For threads: the main thread may wait in the connection above, and where rank 0 is gone a new one
# would be tried for minutes.
_spare: "dist.Store | None" = None
# A rank whose process ended without a word, where this one holds the connection to it.
_silent: int | None = None
# What a rank may have to wait for when it is ended from here.
_unfinished: Callable[[float], None] | None = None


class PeerFailedError(LaunchError):
    """Another rank failed first; carries that rank's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def watch(store: "dist.Store", rank: int, size: int) -> None:
    """Begin to listen for the other ranks' failures; `store` is the one that they met in."""
    global _store, _spare
    _store, _spare = store, store.clone()
    threading.Thread(target=_watch, args=(store.clone(), rank), daemon=True).start()
    if size > 1:
        lifeline.hold(store, rank, size, partial(_gone, World(rank, size)))


def stop_watching() -> None:
    """This rank is done: what the others do concerns it no more."""
    global _store, _spare
    _handled.set()
    _store = _spare = None


def wait_for(unfinished: Callable[[float], None]) -> None:
    """Let a rank that is ended while a collective keeps it first call this, with the seconds left.

    Any other end waits for a rank's threads by itself.
    """
    global _unfinished
    _unfinished = unfinished


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Tell the other ranks of a failure here, and name theirs where it came first.

    After a failure no collective is entered: the connections are closed, which ends the others'
    collectives, and they find the cause in the rendezvous store.
    """
    try:
        yield
    except BaseException as error:
        _handled.set()
        notice = _publish(world, error)
        has_left = _leave_quietly()
        failure = _first_cause(world, error, notice)
        if not has_left:
            _end_stuck(failure)
        if failure is error:
            raise
        raise failure from error


def _first_cause(
    world: World, error: BaseException, notice: dict[str, Any] | None
) -> BaseException:
    """What this rank fails with: its own error, or that of the rank that failed first."""
    if notice is None or notice["rank"] == world.rank:
        if notice is not None and _store is not None:
            _wait_for_readers(_store, world)
        return LaunchError(_lost(world, error)) if _lost_connection(error) else error
    assert _store is not None, "a notice was read from the store"
    _acknowledge(_store)
    if told(error) is not None:
        return error
    return PeerFailedError(
        f"rank {notice['rank']} failed: {notice['message']}", notice["exit_code"]
    )


def _lost(world: World, error: BaseException) -> str:
    if _silent is not None:
        return _GONE.format(_silent)
    return _LOST.format(world.rank, gist(error))


def _lost_connection(error: BaseException) -> bool:
    """Whether another rank is gone from a collective; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _watch(store: dist.Store, rank: int) -> None:
    """End this rank where another failed and its open connections keep a collective waiting.

    DeepSpeed's engine holds the process groups, so that a failed rank's connections stay open until
    it has ended; NCCL never tells at all.
    """
    while not _handled.wait(_WATCH_SECONDS):
        try:
            if not store.check([_NOTICE]):
                continue
            notice = json.loads(store.get(_NOTICE))
        except RuntimeError:
            if not _handled.wait(_GRACE_SECONDS):
                _end(_STORE_GONE, LaunchError.exit_code)
            return
        if notice["stacks"]:
            tell_stacks(rank)
        if _handled.wait(_GRACE_SECONDS):
            return
        _acknowledge(store)
        _end(f"rank {notice['rank']} failed: {notice['message']}", notice["exit_code"])


def _gone(world: World, rank: int) -> None:
    """End this rank and all others, since the process of `rank` has ended without a word."""
    global _silent
    _silent = rank
    if _handled.wait(_GRACE_SECONDS):
        return
    code = LaunchError.exit_code
    _end(first_failure(world, code, _GONE.format(rank)), code)


def _end(cause: str, code: int) -> None:
    """End this rank from a thread, with what it has begun to write."""
    _handled.set()
    sys.stderr.write(f"mmscale: {cause}\n")
    _write_and_end(code)


def _write_and_end(code: int) -> None:
    sys.stderr.flush()
    if _unfinished is not None:
        _unfinished(_LAST_WAIT_SECONDS)
    end_now(code)


def _publish(world: World, error: BaseException) -> dict[str, Any] | None:
    """Post this failure unless one is posted already; return the first."""
    if _store is None or world.size == 1:
        return None
    failure = told(error)
    code = failure.exit_code if failure else 1
    text = str(failure or f"{type(error).__name__}: {error}")
    try:
        if failure is None:
            # Perhaps only the echo of another rank's end: give word of that a moment to arrive.
            _await_word(_store)
        if _lost_connection(error):
            code, text = LaunchError.exit_code, _lost(world, error)
        return _post(_store, world, code, text)
    except RuntimeError:
        return None


def _await_word(store: "dist.Store") -> None:
    deadline = time.monotonic() + _WORD_SECONDS
    while time.monotonic() < deadline and _silent is None and not store.check([_NOTICE]):
        time.sleep(0.05)


def _post(
    store: "dist.Store", world: World, code: int, text: str, stacks: bool = False
) -> dict[str, Any]:
    """Post a notice of this rank's unless one is there; the first.

    Raises:
        RuntimeError: The store is gone.
    """
    mine = {"rank": world.rank, "exit_code": code, "message": text[:2000], "stacks": stacks}
    return dict(json.loads(store.compare_set(_NOTICE, "", json.dumps(mine))))


def first_failure(world: World, code: int, message: str, stacks: bool = False) -> str:
    """For a thread of a rank that is about to end: tell the others why, and wait until they know.

    Args:
        world: The ranks.
        code: Exit code that all end with.
        message: What happened here.
        stacks: The others are to tell where they stand.

    Returns:
        What failed first: `message`, or another rank's.
    """
    _handled.set()
    store = _spare
    if store is None or world.size == 1:
        return message
    with suppress(RuntimeError):
        first = _post(store, world, code, message, stacks)
        if first["rank"] != world.rank:
            _acknowledge(store)
            return f"rank {first['rank']} failed: {first['message']}"
        _wait_for_readers(store, world)
    return message


def tell_stacks(rank: int) -> None:
    """Write the stacks of this rank's threads to stderr."""
    sys.stderr.write(f"mmscale: rank {rank} stands here:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(sys.stderr, all_threads=True)


def _acknowledge(store: "dist.Store") -> None:
    with suppress(RuntimeError):
        store.add(_READ, 1)


def _wait_for_readers(store: "dist.Store", world: World) -> None:
    """The store lives in rank 0: it stays until the others have read the cause, or for seconds."""
    waited = 0.0
    with suppress(RuntimeError):
        while waited < _NOTICE_SECONDS and store.add(_READ, 0) < world.size - 1:
            time.sleep(0.05)
            waited += 0.05


def _leave_quietly() -> bool:
    """Close this rank's connections; whether that came to an end.

    NCCL may wait here for an exchange that the others never join.
    """
    if not dist.is_initialized():
        return True
    leaving = threading.Thread(target=_leave, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_SECONDS)
    return not leaving.is_alive()


def _leave() -> None:
    with suppress(RuntimeError):
        dist.destroy_process_group()


def _end_stuck(failure: BaseException) -> None:
    """Tell why, and end this process although a thread of it will not."""

    def fail() -> int:
        raise failure

    try:
        code = explained(fail)
    except BaseException:  # noqa: BLE001 - whatever the run failed with
        traceback.print_exc()
        code = 1
    _write_and_end(code)


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
