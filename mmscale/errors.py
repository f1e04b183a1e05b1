"""The exception family: what went wrong in one sentence, and the exit code that it ends with.

A message names the setting or file, the value, the rule and the repair. User mistakes raise one of
these; `assert` is for mmscale's own invariants.
"""

import sys
from collections.abc import Callable


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
    """The process was told to end by SIGTERM and has written a checkpoint."""

    exit_code = 143


def printable(text: str) -> str:
    """A text that may come from data, with all that could steer a terminal written as escapes."""
    return "".join(
        part if part.isprintable() or part in "\n\t" else repr(part)[1:-1] for part in text
    )


def explained(action: Callable[[], int]) -> int:
    """Run a command; a failure becomes a sentence on stderr and its exit code.

    A bug of our own keeps its traceback and ends with 1.
    """
    try:
        return action()
    except MmscaleError as error:
        sys.stderr.write(f"mmscale: {printable(str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("mmscale: interrupted\n")
        return 130
