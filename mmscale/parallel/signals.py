"""Signals that ask a process to end: SIGTERM, SIGUSR1 (a scheduler's early warning) and Ctrl-C.

Where nothing is lost they end it wherever it is; between updates they are noted and acted on there.
"""

import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mmscale.errors import Stop, TerminatedError, explained

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
# A decoding process that hangs must not keep its parent from ending for longer.
_GRACE_SECONDS = 600
_PATIENCE_SECONDS = 8.0
_LOOK_SECONDS = 0.5
# Two that come together are one Ctrl-C, which a launcher has passed on too.
_AGAIN_SECONDS = 0.7
# A signal that comes again later than this means it.
_RAISE_SECONDS = 5.0
_HEARD = b"\0"

# Where handlers say that they have run; a process that is forked must not write there.
_said: int | None = None
# A second Ctrl-C is the watcher's, and must not disturb the end that the first one began.
_interrupted = False


class StopSignal:
    """Listens for SIGTERM and SIGUSR1 from the moment it is made.

    The end of a launcher above this process counts as one: some end at SIGTERM without a word to
    their ranks.

    Args:
        at_once: Raise `Stop` wherever the process is, instead of noting the signal.
    """

    def __init__(self, at_once: bool = False) -> None:
        self._noted, self.is_at_once = False, at_once
        self._pid, self._raised = os.getpid(), -_RAISE_SECONDS
        self._launchers = Launchers(self._pid)
        # Beside the main thread nothing is heard: whoever started the thread listens.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, self._note)

    @property
    def wanted(self) -> bool:
        """The run is to end."""
        return self._noted or self.is_abandoned

    @property
    def is_abandoned(self) -> bool:
        """A launcher above this process has ended."""
        return self._launchers.gone

    def note_from_now(self) -> None:
        """From here on there is something to lose: signals are noted only."""
        self.is_at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Lines where nothing is lost: a signal, also one that was noted, raises `Stop`."""
        before, self.is_at_once = self.is_at_once, True
        try:
            if self.wanted:
                raise Stop
            yield
        finally:
            self.is_at_once = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        _say_heard()
        # A process that is forked from here has handlers of its own, in a moment.
        if self.is_at_once and os.getpid() == self._pid:
            now = time.monotonic()
            # Several come where each of a job's processes passes one on: what ends is let end.
            if now - self._raised > _RAISE_SECONDS:
                self._raised = now
                raise Stop


def heeding_signals(
    command: Callable[[], int], within: Callable[[Callable[[], int]], int] = explained
) -> int:
    """Run a command: signals end it at once, in one line, and always within seconds.

    A thread ends the process where its main thread does not come back to Python, and at a second
    Ctrl-C.

    Args:
        command: What is run.
        within: Calls it, and makes an exit code of a failure; or lets it pass.

    Returns:
        The exit code.
    """
    global _interrupted
    if threading.current_thread() is not threading.main_thread():
        return within(command)
    numbers = (*STOPPING, signal.SIGINT)
    # A signal that comes while handlers are put up or taken down waits until they are.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    before = {number: signal.getsignal(number) for number in numbers}
    _interrupted = False
    stop = StopSignal(at_once=True)
    # A shell that starts a job in the background has Ctrl-C ignored.
    if before[signal.SIGINT] is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with _watched(stop):
            return within(lambda: _with_signals(command, mask))
    finally:
        _kill_children()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill_children() -> None:
    """End decoding processes that are left; a loader's listener for such an end would raise."""
    listener = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(_PATIENCE_SECONDS)
    # A loader puts its listener up once in a process, and the next command's needs it too.
    signal.signal(signal.SIGCHLD, listener)


def _with_signals(command: Callable[[], int], mask: Iterable[int]) -> int:
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        return command()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _say_heard()
    if not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt


def _say_heard() -> None:
    if _said is not None:
        os.write(_said, _HEARD)


@contextmanager
def _watched(stop: StopSignal) -> Iterator[None]:
    """Let a thread see every signal as it arrives, before the main thread runs its handler."""
    global _said
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False), _said
    _said = writing
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reading, stop, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before[0])
        _said = before[1]
        over.set()
        watcher.join()
        os.close(reading)
        os.close(writing)


def _watch(reading: int, stop: StopSignal, over: threading.Event) -> None:
    unheard: tuple[int, float] | None = None
    interrupted, abandoned = 0.0, False
    while not over.is_set():
        now = time.monotonic()
        for number in _arrived(reading):
            if number in (*STOPPING, signal.SIGINT):
                unheard = number, now
            if number == signal.SIGINT:
                if interrupted and now - interrupted > _AGAIN_SECONDS:
                    _end(signal.SIGINT, "interrupted twice, ended at once")
                interrupted = interrupted or now
            if number == _HEARD[0]:
                unheard = None
        if unheard and now - unheard[1] > _PATIENCE_SECONDS and _ends_at_once(unheard[0]):
            _end(unheard[0], "told to stop, and ended where it stood")
        if not abandoned and stop.is_abandoned and _ends_at_once(signal.SIGTERM):
            abandoned = True
            os.kill(os.getpid(), signal.SIGTERM)


def _arrived(reading: int) -> bytes:
    """Numbers of the signals that have come, waited for a moment."""
    ready, _, _ = select.select([reading], [], [], _LOOK_SECONDS)
    return os.read(reading, 256) if ready else b""


def _ends_at_once(number: int) -> bool:
    """Whether the signal is not only noted; a run listens with a `StopSignal` of its own."""
    listener = getattr(signal.getsignal(number), "__self__", None)
    return number == signal.SIGINT or getattr(listener, "is_at_once", False)


def _end(number: int, why: str) -> None:
    sys.stderr.write(f"mmscale: {why}\n")
    sys.stderr.flush()
    end_now(130 if number == signal.SIGINT else TerminatedError.exit_code)


def end_now(code: int) -> None:
    """End this process from a thread, with its decoding processes: they may hang themselves."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _forget_the_watcher() -> None:
    """In a process that is forked: its signals are not its parent's."""
    global _said
    if _said is not None:
        signal.set_wakeup_fd(-1)
        _said = None


os.register_at_fork(after_in_child=_forget_the_watcher)


def outlive_termination(worker: int) -> None:
    """For a decoding process: stay while the training process ends its step and writes.

    Schedulers signal every process of a job at once, and a loader whose worker died cannot finish
    the batch. It ends with the training process, and is killed by it where it hangs; the delay is
    bounded besides.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))


_PROGRAMS = ("deepspeed", "accelerate", "torchrun")
_MODULES = ("deepspeed.launcher.", "accelerate.commands.", "torch.distributed.")


class Launchers:
    """The chain of launchers from a process upwards, as it is now; empty where /proc is missing."""

    def __init__(self, pid: int):
        self._links: list[tuple[int, int]] = []
        while (parent := _parent(pid)) is not None and _is_launcher(parent):
            self._links.append((pid, parent))
            pid = parent

    @property
    def gone(self) -> bool:
        """One of them has ended, so that nobody waits for the ranks any more."""
        return any(_parent(child) != parent for child, parent in self._links)


def _parent(pid: int) -> int | None:
    try:
        # The program's name stands in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")[:4]
    except OSError:
        return False
    return any(Path(word).name in _PROGRAMS or word.startswith(_MODULES) for word in words)
