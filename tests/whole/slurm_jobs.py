"""Jobs on a real Slurm of this machine's own: `tools/slurm_cluster.py` around the test."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.whole.command import ROOT, end, explain, run, start

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SECONDS = 150.0


def why_not() -> str | None:
    """Why this machine cannot have a Slurm of its own; None where it can."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if lacking:
        return f"no {', '.join(lacking)}: run tools/install-system-packages.sh"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


@dataclass(frozen=True)
class Cluster:
    """A running Slurm; jobs are submitted from `folder`, where their logs land."""

    config: str
    folder: Path

    def ask(self, *words: str | Path) -> str:
        """What a command of Slurm prints; it must end with 0."""
        env = {"SLURM_CONF": self.config, "MMSCALE_ROOT": str(ROOT)}
        done = run(list(words), cwd=self.folder, env=env)
        assert done.returncode == 0, explain(done)
        return done.stdout.strip()

    def submit(self, script: str, *words: str | Path, options: tuple[str, ...] = ()) -> str:
        """A job of one of our scripts; returns its number."""
        return self.ask("sbatch", "--parsable", *options, ROOT / "slurm" / script, *words)

    def state(self, job: str) -> str:
        """Of a job, or of an array's tasks that differ, in one word."""
        fields = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        found = {field.removeprefix("JobState=") for field in fields if "JobState=" in field}
        return "+".join(sorted(found))

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        fields = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return next(int(field[9:]) for field in fields if field.startswith("Restarts="))

    def resumed(self, job: str) -> list[int]:
        """The steps after which the job's run went on, in the order of its starts."""
        said = self.rank_logs(job)["rank-0.log"].read_text("utf-8")
        return [
            int(step.replace(",", "")) for step in re.findall(r"resumed after step ([\d,]+)", said)
        ]

    def finish(self, job: str, state: str = "COMPLETED") -> None:
        """Wait for a job's end, which must be `state`."""
        over = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"}
        self.wait(job, lambda: set(self.state(job).split("+")) <= over, "has not ended")
        assert self.state(job) == state, self.logs(job)

    def wait(self, job: str, happened: Callable[[], bool], complaint: str) -> None:
        """Poll until something has happened to a job."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < deadline, f"job {job} {complaint}\n{self.logs(job)}"
            time.sleep(0.2)

    def logs(self, job: str) -> str:
        """The ends of everything that a job wrote."""
        paths = [*self.folder.glob(f"slurm-{job}*.out"), *self.rank_logs(job).values()]
        return "\n".join(f"--- {path}\n{path.read_text('utf-8')[-3000:]}" for path in paths)

    def rank_logs(self, job: str) -> dict[str, Path]:
        """The ranks' own logs by name."""
        return {
            path.name: path for path in sorted((self.folder / "runs/slurm" / job).glob("rank-*"))
        }


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A Slurm of two nodes with one processor each, for as long as the context is open."""
    # It stays until its command ends, which is when our end of the pipe is closed, however we end.
    words = ["python", ROOT / "tools" / "slurm_cluster.py", "sh", "-c", "echo $SLURM_CONF; cat"]
    process = start(words, stdin=subprocess.PIPE)
    try:
        assert process.stdout is not None, "it was asked for"
        config = process.stdout.readline().strip()
        assert config, "no Slurm:\n" + process.communicate()[1]
        yield Cluster(config, folder)
        process.communicate(timeout=60)
    finally:
        end(process)
