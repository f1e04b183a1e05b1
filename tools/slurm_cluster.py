#!/usr/bin/env python3
"""Run a command inside a real two-node Slurm on this machine, which is gone when it has ended.

tools/slurm_cluster.py bash
tools/slurm_cluster.py sbatch --wait --nodes=2 slurm/train.sbatch demo run.dir=runs/slurm-demo

Needs root and Debian's slurm-wlm and munge (tools/install-system-packages.sh). Both nodes are
daemons on this machine with one processor each; whatever jobs leave running is killed at the end.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("n1", "n2")
UP_SECONDS = 30.0
# A requeued job waits as long as a credential lives; Slurm's own default is two minutes.
CONFIG = """
ClusterName=mmscale
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
UnkillableStepTimeout=60
SchedulerParameters=sched_interval=1,bf_interval=1
FirstJobId={first_job}
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    if not command or command[0].startswith("-"):
        sys.stderr.write(__doc__ or "")
        return 2
    os.environ["PATH"] += os.pathsep + os.pathsep.join(("/usr/sbin", "/sbin"))
    lacking = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name)]
    if os.geteuid() != 0 or lacking:
        why = f"lacks {', '.join(lacking)}" if lacking else "needs root"
        sys.stderr.write(f"slurm_cluster: {why}; run tools/install-system-packages.sh as root\n")
        return 2
    # Steps detach from the daemon that started them; they shall come to us, not to init.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        try:
            with _running(Path(folder)):
                return subprocess.call(command)
        finally:
            _end_all()


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[None]:
    """The daemons, from the moment both nodes are idle."""
    folder.chmod(0o755)  # munged's socket must be reachable by everyone
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    config = folder / "slurm.conf"
    config.write_text(_config(folder), "utf-8")
    os.environ["SLURM_CONF"] = str(config)
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid"}
    options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    _start("munged", "--foreground", *options, f"--seed-file={folder}/munge.seed")
    _wait_for(folder, lambda: (folder / "munge.socket").exists(), "munged")
    _start("slurmctld", "-D")
    for node in NODES:
        _start("slurmd", "-D", "-N", node)
    _wait_for(folder, lambda: _states() == ["idle"] * len(NODES), "nodes")
    yield
    subprocess.run(["scancel", "--user=root"], capture_output=True, check=False)


def _config(folder: Path) -> str:
    with contextlib.ExitStack() as taken:
        ports = [_free_port(taken) for _ in range(len(NODES) + 1)]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=1"
        for node, port in zip(NODES, ports, strict=False)
    )
    # The scripts' rendezvous port follows from the job's number: others than a neighbour's.
    first_job = 1 + os.getpid() % 9000
    return CONFIG.format(folder=folder, controller_port=ports[-1], nodes=nodes, first_job=first_job)


def _free_port(taken: contextlib.ExitStack) -> int:
    listener = taken.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    return int(listener.getsockname()[1])


def _start(*words: str) -> None:
    # In a group of its own: Ctrl-C is for the command, the daemons end after it.
    subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _states() -> list[str]:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()


def _wait_for(folder: Path, up, what: str) -> None:
    deadline = time.monotonic() + UP_SECONDS
    while not up():
        if time.monotonic() > deadline:
            for log in sorted(folder.glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n{log.read_text('utf-8')[-2000:]}")
            sys.exit(f"slurm_cluster: {what} not up within {UP_SECONDS:g} s")
        time.sleep(0.1)


def _end_all() -> None:
    """Ask every descendant to end, then kill: daemons, steps, and what jobs left behind."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        asked: set[int] = set()
        while (left := _descendants()) and time.monotonic() < deadline:
            for process in left - asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            asked |= left
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)


def _descendants() -> set[int]:
    """Numbers of this process's children, theirs, and so on."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in brackets may hold anything, the parent is the second word after it.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
