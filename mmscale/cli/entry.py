"""The entry point: a verb runs under signals, and its errors are told in a sentence."""

import os
import sys

import typer

# Each puts its verbs into the command.
from mmscale.cli import blend, examine, exports, pairs, runs, search, trained  # noqa: F401
from mmscale.cli.command import app
from mmscale.errors import ConfigError, saying_how_to_go_on
from mmscale.parallel.signals import heeding_signals

_GOES_ON = "the same command goes on where it stopped"
# After a signal; train says it itself.
_WAYS_ON = {"pack": _GOES_ON, "sweep": _GOES_ON, "synth": "the same command renders it again"}


def main() -> None:
    """Entry point of the console script."""
    # Read when torch is imported: what MPS lacks runs on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    sys.exit(heeding_signals(_invoke))


def _invoke() -> int:
    # Outside click's own error handling a verb's exit code is whatever it returns.
    verb = "".join(sys.argv[1:2])
    if not verb:
        app(["--help"], standalone_mode=False)
        return 2
    with saying_how_to_go_on(lambda: _WAYS_ON.get(verb, "nothing was written")):
        try:
            return app(standalone_mode=False) or 0
        except typer.Exit as leave:
            return leave.exit_code
        except typer.Abort as error:
            raise KeyboardInterrupt from error
        except Exception as error:
            if hasattr(error, "format_message"):
                raise ConfigError(f"{error.format_message()} (see mmscale --help)") from error
            raise
