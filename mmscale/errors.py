"""The exception family: what went wrong in one sentence, and the exit code that it ends with.

A message names the setting or file, the value, the rule and the repair. User mistakes raise one of
these; `assert` is for mmscale's own invariants.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MmscaleError(Exception):
    """Base of every failure that mmscale explains in one sentence."""

    exit_code = 1


class ConfigError(MmscaleError):
    """The configuration or the command is wrong."""

    exit_code = 2


class HaltError(MmscaleError):
    """Training was halted by its guard."""

    exit_code = 3


class DataError(MmscaleError):
    """The data is wrong: missing, damaged, or not what its manifest says."""

    exit_code = 4


class CheckpointError(MmscaleError):
    """A checkpoint cannot be used."""

    exit_code = 5


class LaunchError(MmscaleError):
    """A rank or the launch failed."""

    exit_code = 6


class TerminatedError(MmscaleError):
    """The process was told to end by SIGTERM or SIGUSR1, and has kept what it can."""

    exit_code = 143


class InterruptError(MmscaleError):
    """Ctrl-C."""

    exit_code = 130


class Stop(BaseException):
    """A signal asked the process to end: raised wherever it is, as KeyboardInterrupt is.

    No Exception, so that no library takes it for a failure of its own.
    """


# What the system says of a path or a disk, and what can be done about it.
_STORAGE = {
    errno.ENOENT: "there is no such file or folder",
    errno.EACCES: "this user may not do it; change the permissions or name another place",
    errno.EPERM: "this user may not do it; change the permissions or name another place",
    errno.EROFS: "the disk is mounted read-only; name a place on another",
    errno.ENOSPC: "the disk is full; free space, or name a place on another",
    errno.EDQUOT: "the disk quota is used up; free space, or name a place on another disk",
    errno.ENOTDIR: "a file stands where a folder is needed; name another place",
    errno.EEXIST: "a file stands where a folder is needed; name another place",
    errno.EISDIR: "a folder stands where a file is needed; name a file",
    errno.ENOTEMPTY: "the folder holds something already; name another place",
    errno.ENAMETOOLONG: "the path is too long; name a shorter one",
    errno.ELOOP: "its symbolic links lead in a circle; mend them",
    errno.EIO: "the disk fails (input/output error); name a place on another",
    errno.ESTALE: "the network disk has lost the file; mount it again",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
    errno.EFBIG: "the disk takes no file so large; name a place on another",
    errno.EBUSY: "something else is using it",
    errno.ETXTBSY: "something else is using it",
    errno.EOPNOTSUPP: "nothing can be kept there; name another place",
}


# What torch raises, at any place, when one of its loader's processes is gone.
_LOST_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal|exited unexpectedly)"
)


# Where in C++ an error comes from: `[/src/gloo/tcp/pair.cc:553] `, ` at /src/c10d/Utils.hpp:783`.
_SOURCE = re.compile(
    r"(?: at)? ?\[?(?:\.{0,2}/[\w.+-]+)*/?[\w.+-]+\.(?:cc|cpp|cu|cuh|h|hpp):\d+\]?:? ?"
)


def storage_fault(error: BaseException) -> str | None:
    """What a path or a disk has against it, and the repair; None for any other error."""
    if isinstance(error, OSError):
        return _STORAGE.get(error.errno or 0)
    # The library of tensor files writes by itself, and tells the system's number in its text.
    found = re.search(r"os error (\d+)", str(error))
    if found is None or type(error).__name__ != "SafetensorError":
        return None
    return _STORAGE.get(int(found[1]))


def told(error: BaseException) -> MmscaleError | None:
    """What is told of a failure in one sentence; None for a bug of our own."""
    if isinstance(error, MmscaleError):
        return error
    if isinstance(error, Stop):
        return TerminatedError("told to stop")
    if isinstance(error, KeyboardInterrupt):
        return InterruptError("interrupted")
    if (killed := _LOST_WORKER.search(str(error))) and isinstance(error, RuntimeError):
        # The signal is in the cause where the worker was missed in mid-wait.
        end = _end_of(f"{error} {error.__cause__ or ''}")
        return LaunchError(
            f"a decoding process (pid {killed[1]}) was ended from outside{end}; "
            "start the command again, a run goes on from its last checkpoint"
        )
    if (fault := storage_fault(error)) is None:
        return None
    name = getattr(error, "filename", None)
    where = name if isinstance(name, (str, os.PathLike)) else "a file of this command"
    return ConfigError(f"{os.fspath(where)}: {fault}")


def _end_of(text: str) -> str:
    """How a decoding process ended, and what helps against that."""
    if "Bus error" in text or "shared memory" in text:
        return " (no shared memory was left): enlarge /dev/shm, or lower data.workers"
    if "Alarm clock" in text:
        return ": the job was told to end and this rank did not within its time"
    said = re.search(r"by signal: ([\w ]+)", text)
    name = f" ({said[1]})" if said else ""
    return f"{name}, mostly for lack of memory: lower data.workers or data.shuffle_buffer"


def gist(error: BaseException) -> str:
    """The first line of a library's error, without the place in the library's source."""
    first = str(error).strip().split("\n")[0]
    return _SOURCE.sub("", first).strip() or type(error).__name__


def printable(text: str) -> str:
    """A text that may come from data, with all that could steer a terminal written as escapes."""
    return "".join(
        part if part.isprintable() or part in "\n\t" else repr(part)[1:-1] for part in text
    )


@contextmanager
def saying_how_to_go_on(way: Callable[[], str]) -> Iterator[None]:
    """Lines that a signal may end: how to go on is added to what is told then."""
    try:
        yield
    except (KeyboardInterrupt, Stop) as error:
        ended = told(error)
        assert ended is not None, "both are told"
        raise type(ended)(f"{ended}; {way()}") from None


def explained(action: Callable[[], int]) -> int:
    """Run a command; a failure becomes a sentence on stderr and its exit code.

    A bug of our own keeps its traceback and ends with 1.
    """
    try:
        return action()
    except (Exception, KeyboardInterrupt, Stop) as error:
        if (failure := told(error)) is None:
            raise
        sys.stderr.write(f"mmscale: {printable(str(failure))}\n")
        return failure.exit_code
