"""Kill a training run again and again, and compare what it ends with to a run that nobody touched.

python tools/chaos.py [--kills 20] [--seed 0] [--steps 100] [--table FILE]

Two ranks of ZeRO-2 train a small model on rendered pairs. Each life of the run is ended by kill -9,
of one rank or of both, at a random moment or while a checkpoint is being written; the same command
then starts it again. Ends with 0 only if the finished weights and moments are those of the
uninterrupted run bit for bit, and every step has the same loss and the same rows.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mmscale.checkpoint.files import Checkpoint, step_folders
from mmscale.data.pack import PackSettings, pack
from mmscale.data.synth import SynthSettings, render
from mmscale.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """
data: {image_size: 32, workers: 1}
model:
  vision:
    name: timm:convnext_atto
    weights: random
    options: {depths: [1, 1, 1, 1], dims: [16, 32, 48, 64], drop_rate: 0.1}
  text:
    name: openclip:ViT-B-32
    weights: random
    options: {width: 64, layers: 1, heads: 2, context_length: 32}
  embed_dim: 32
negatives: {queue: {size: 64}}
train: {global_batch_size: 16}
optim: {lr: 1e-3, warmup: 2 steps}
eval: {every: null}
engine: {deepspeed: ds_configs/zero2.json}
checkpoint: {every: 3 steps, keep: 2}
log: {page: false}
"""
RANKS = 2
MOMENTS = ("anywhere", "anywhere", "in a save")
VICTIMS = ((0,), (1,), (0, 1))
_LONGEST_LIFE = 180.0


@dataclass
class Life:
    """One life of the run, as the table tells it."""

    number: int
    moment: str
    victims: tuple[int, ...]
    first: int
    last: int
    checkpoint: int
    partial: str

    def row(self) -> str:
        """A line of the table."""
        who = "both ranks" if len(self.victims) == RANKS else f"rank {self.victims[0]}"
        return (
            f"| {self.number} | {who} | {self.moment} | {self.first} | {self.last} | "
            f"{self.checkpoint} | {self.partial} |"
        )


HEADER = (
    "| kill | of | aimed at | first step | last step | newest checkpoint | being written |\n"
    "|---|---|---|---|---|---|---|"
)


class Trial:
    """One run folder and the processes that train in it."""

    def __init__(self, words: list[str], run_dir: Path):
        self.run_dir = run_dir
        self._words = [sys.executable, str(ROOT / "mmscale" / "train.py"), *words]
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._log_before = 0
        self._said = run_dir.with_suffix(".log")

    def start(self) -> None:
        """Start the ranks, as srun does: no launcher above them."""
        self._log_before = self._log_changed()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
        with self._said.open("ab") as said:
            self._ranks = [
                subprocess.Popen(
                    [*self._words, f"run.dir={self.run_dir}"],
                    cwd=ROOT,
                    env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
                for rank in range(RANKS)
            ]

    def steps(self) -> list[int]:
        """Every step in the log."""
        log = self.run_dir / "metrics.jsonl"
        return (
            [line["step"] for line in read_metrics(log) if "loss" in line] if log.exists() else []
        )

    def begun(self) -> bool:
        """This life has taken over the log: what is seen from now on is of its making."""
        return self._log_changed() != self._log_before

    def _log_changed(self) -> int:
        try:
            return (self.run_dir / "metrics.jsonl").stat().st_ctime_ns
        except FileNotFoundError:
            return 0

    def partial(self) -> str:
        """The checkpoint that is being written."""
        found = sorted((self.run_dir / "checkpoints").glob("step-*.partial"))
        return found[-1].stem if found else ""

    def running(self) -> bool:
        """Whether a rank is still there."""
        return any(rank.poll() is None for rank in self._ranks)

    def kill(self, victims: tuple[int, ...]) -> None:
        """Send SIGKILL, and see the others end by themselves."""
        for victim in victims:
            self._ranks[victim].kill()
        self.wait()

    def wait(self) -> list[int]:
        """Every rank's exit code."""
        deadline = time.monotonic() + _LONGEST_LIFE
        try:
            return [rank.wait(deadline - time.monotonic()) for rank in self._ranks]
        finally:
            for rank in self._ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Train to the end."""
        self.start()
        if any(self.wait()):
            sys.exit(f"the run did not end with 0:\n{self._said.read_text()[-4000:]}")


def live_and_die(trial: Trial, number: int, chance: random.Random, total: int) -> Life | None:
    """One life of the run; None where it reached its end before the blow fell."""
    moment, victims = chance.choice(MOMENTS), chance.choice(VICTIMS)
    before = _newest(trial)
    # Over so many lives the run comes far, and not to its end.
    target = min(total - 1, before + chance.randint(1, 6))
    pause = chance.random() * 0.1
    trial.start()
    deadline = time.monotonic() + _LONGEST_LIFE
    while trial.running() and time.monotonic() < deadline:
        if not trial.begun():
            time.sleep(0.005)
            continue
        if moment == "in a save":
            if trial.partial():
                break
            time.sleep(0.0005)  # a save of this model takes some milliseconds
            continue
        if (steps := trial.steps()) and steps[-1] >= target:
            time.sleep(pause)
            break
        time.sleep(0.005)
    if not trial.running():
        return None
    trial.kill(victims)
    steps = trial.steps()
    return Life(number, moment, victims, before + 1, steps[-1], _newest(trial), trial.partial())


def _newest(trial: Trial) -> int:
    folders = step_folders(trial.run_dir)
    return int(folders[0].name.removeprefix("step-")) if folders else 0


def differences(wanted: Path, got: Path) -> list[str]:
    """Tensors and log lines that are not those of the uninterrupted run."""
    found = []
    one, other = (Checkpoint(step_folders(folder)[0]) for folder in (wanted, got))
    for name, about in one.tensors.items():
        found += [
            f"{kind} of {name}"
            for kind in ("value", *about.moments)
            if not torch.equal(one.read(kind, name), other.read(kind, name))
        ]
    courses = [
        [
            (line["step"], line["loss"], line["keys_digest"])
            for line in read_metrics(folder / "metrics.jsonl")
            if "loss" in line
        ]
        for folder in (wanted, got)
    ]
    if courses[0] != courses[1]:
        found.append("metrics.jsonl")
    return found


def main() -> None:
    """Both runs, the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--table", type=Path, help="write the table there too")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        lines = _trials(Path(name), asked)
    lines.append(f"{time.monotonic() - begun:.0f} s, seed {asked.seed}")
    for line in lines[-3:]:
        print(line)
    if asked.table:
        asked.table.parent.mkdir(parents=True, exist_ok=True)
        asked.table.write_text("\n".join(lines) + "\n", "utf-8")
    sys.exit("equal bit for bit" not in lines[-2])


def _trials(folder: Path, asked: argparse.Namespace) -> list[str]:
    render(folder / "source", SynthSettings(144, seed=0, size=64, val=24, test=24))
    pack(folder / "source", folder / "packed", PackSettings(samples_per_shard=32))
    settings = folder / "chaos.yaml"
    settings.write_text(SETTINGS, "utf-8")
    words = [
        str(settings),
        f"data.train={folder / 'packed' / 'train'}",
        f"data.eval={folder / 'packed' / 'val'}",
        f"train.duration={asked.steps} steps",
    ]
    straight, struck = Trial(words, folder / "straight"), Trial(words, folder / "struck")
    straight.finish()
    chance, lives = random.Random(asked.seed), [HEADER]
    print(HEADER, flush=True)
    while len(lives) <= asked.kills:
        life = live_and_die(struck, len(lives), chance, asked.steps)
        if life is None:
            sys.exit(f"the run ended before kill {len(lives)}; give it more --steps")
        lives.append(life.row())
        print(lives[-1], flush=True)
    struck.finish()
    wrong = differences(straight.run_dir, struck.run_dir)
    steps = len(straight.steps())
    verdict = "; ".join(wrong) or f"all {steps} steps, weights and moments equal bit for bit"
    return [*lives, "", f"{asked.kills} kills: {verdict}"]


if __name__ == "__main__":
    main()
