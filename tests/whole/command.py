"""Real commands for tests, each in a process group of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "mmscale" / "train.py"
# Launchers and `mmscale` of the interpreter that runs the tests.
BIN = Path(sys.executable).parent


def run(
    words: Sequence[str | Path],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `words` to its end; the whole group is killed when `timeout` seconds are over.

    Args:
        words: Program and arguments; programs of the tests' environment are found by name.
        cwd: Working folder; default the checkout.
        env: Added to the tests' own environment.
        timeout: Seconds.

    Raises:
        subprocess.TimeoutExpired: With what was printed until then.
    """
    process = start(words, cwd, env)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        end(process)
        expired.stdout, expired.stderr = process.communicate()
        raise
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(
    words: Sequence[str | Path],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
) -> subprocess.Popen[str]:
    """Start `words` and return at once; the caller signals it, and ends it with `end`."""
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd or ROOT,
        env={**environment(), **(env or {})},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kill whatever is left of the process's group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def environment() -> dict[str, str]:
    """The tests' environment without traces of a launcher, our programs first."""
    traces = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in traces and not name.startswith(("SLURM_", "PYTEST_"))
    }
    return clean | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}


def explain(done: subprocess.CompletedProcess[str]) -> str:
    """What to show when a command ended otherwise than expected."""
    return (
        f"{' '.join(map(str, done.args))}\nended with {done.returncode}\n"
        f"--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-4000:]}"
    )
