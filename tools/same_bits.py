"""Compare what two commits compute, to the last digit: a refactor keeps every bit.

python tools/same_bits.py BASE [HEAD] [--only NAME...] [--fields REGEX]

Both commits are checked out beside each other and start the same short runs, on this machine and
with as many threads. HEAD starts each run a second time from its checkpoint in the middle. The
table says whether both logged the same losses, keys, gradient norms, scales and evaluations as BASE
did without an interruption, and where they first differ. Ends with 0 only if nothing differs. Given
the same commit twice it shows what this machine repeats.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIELDS = r"loss|keys_digest|grad_norm.*|logit_scale|eval/.*"
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST = 900.0
# As many pairs as fill one batch of the preset `demo` a few times over.
IMAGES, SIDE = 480, 48

# Small towers, without dropout; a batch is a sixteenth of an epoch or more.
SMALL = """
data: {image_size: 32, workers: 1}
model:
  vision:
    name: timm:convnext_atto
    weights: random
    options: {depths: [1, 1, 1, 1], dims: [16, 32, 48, 64]}
  text:
    name: openclip:ViT-B-32
    weights: random
    options: {width: 64, layers: 1, heads: 2, context_length: 32}
  embed_dim: 32
train: {duration: 20 steps, global_batch_size: 64}
optim: {lr: 1e-3, warmup: 2 steps}
eval: {every: 10 steps}
checkpoint: {every: 10 steps, keep: 10}
log: {page: false}
"""
# Refused where nothing is fused.
FUSION = "model.fusion={layers: 1, dim: 32, heads: 2}"
TERMS = (
    {"kind": "infonce", "label_smoothing": 0.1},
    {"kind": "infonce", "temperature": 0.1},
    {"kind": "dcl", "weight": 0.1},
    {"kind": "siglip", "weight": 0.1},
    {"kind": "ntxent", "weight": 0.1},
    {"kind": "supcon", "weight": 0.1, "temperature": 0.1, "base_temperature": 0.07},
    {"kind": "hinge", "hardness": {"from": 0, "to": 1, "over": "10 steps"}},
    {"kind": "hinge", "semi_hard": True, "hardness": 0.5},
    {"kind": "hn_nce", "alpha": 0.5, "beta": {"from": 0, "to": 1, "over": "10 steps"}},
    {"kind": "spectral", "weight": 0.5},
    {"kind": "vicreg", "weight": 0.04},
    {"kind": "barlow", "weight": 0.01},
    {"kind": "decorrelation", "weight": 0.2},
    {"kind": "alignment", "weight": 0.1},
    {"kind": "uniformity", "weight": 0.1},
    {"kind": "regression", "weight": 0.5},
    {"kind": "diversity", "weight": 0.1},
    {"kind": "distillation", "alpha": {"from": 0, "to": 0.4, "over": "10 steps"}},
)
FUSED = (
    {"kind": "infonce"},
    {"kind": "matching"},
    {
        "kind": "prototypes",
        "clusters": [4, 7],
        "weight": {"from": 0, "to": 0.5, "over": "1 epochs", "start": "1 epochs"},
    },
)
HARD_BATCHES = {
    "table": "self",
    "window": 3,
    "share": {"from": 0.2, "to": 0.8, "over": "10 steps"},
}
STAGES = (
    {"name": "heads", "duration": "6 steps", "train": ["head", "scale"], "optim": {"lr": 2e-3}},
    {
        "name": "queue",
        "duration": "8 steps",
        "train": ["head", "scale", "text[-1:]"],
        "negatives": {"queue": {"size": 100}},
        "global_batch_size": 32,
    },
    {
        "name": "all",
        "duration": "6 steps",
        "optim": {"lr_scale": {"vision": 0.1}, "layer_decay": {"text": 0.5}},
        "loss": {"terms": [{"kind": "infonce"}, {"kind": "matching"}]},
    },
)


@dataclass(frozen=True)
class Kind:
    """A run that both commits start.

    Attributes:
        words: Its settings after the small ones; only such as every commit knows.
        ranks: Processes, by torchrun where there are several.
        middle: Step of the checkpoint that it goes on from.
        preset: What it starts from; None: the small towers.
    """

    words: tuple[str, ...] = ()
    ranks: int = 1
    middle: int = 10
    preset: str | None = None


def _zero(stage: int) -> Kind:
    return Kind((f"engine.deepspeed=ds_configs/zero{stage}.json",), ranks=2)


KINDS: dict[str, Kind] = {
    "demo": Kind(
        ("train.duration=60 steps", "eval.every=30 steps", "checkpoint={every: 30 steps, keep: 9}"),
        middle=30,
        preset="demo",
    ),
    "chunks": Kind(("train.global_batch_size=128", "train.micro_batch_size=32")),
    "ranks": Kind(ranks=2),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
    "queue": Kind(
        (
            'negatives.queue={size: 100, share: {from: 0.2, to: 1, over: "10 steps"}}',
            "eval.weights=ema",
        )
    ),
    "fusion": Kind((FUSION, f"loss.terms={json.dumps(FUSED)}")),
    "mining": Kind(
        (
            "negatives.queue.size=100",
            "negatives.mining={kind: semi_hard, share: 0.2}",
            'negatives.mining.strength={from: 0, to: 1, over: "10 steps"}',
        )
    ),
    "hard-batches": Kind((f"data.hard_batches={json.dumps(HARD_BATCHES)}",)),
    "stages": Kind((FUSION, f"stages={json.dumps(STAGES)}")),
    "cached": Kind(
        (
            "data={augment: none, feature_cache: features}",
            "model.vision.frozen=true",
            "model.text.frozen=true",
            "model.head={standardize: 200, init: cca, fit_rows: 200, dropout: 0.2}",
        )
    ),
    "terms": Kind((f"loss.terms={json.dumps(TERMS)}", "negatives.queue.size=100")),
    "terms-ranks": Kind((f"loss.terms={json.dumps(TERMS)}", "negatives.queue.size=100"), ranks=2),
}


class FailedError(Exception):
    """A command of one of the commits did not end with 0."""


@dataclass(frozen=True)
class Commit:
    """A commit on disk.

    Attributes:
        code: Its work tree.
        folder: Where its pairs and runs lie.
        threads: Of each process.
    """

    code: Path
    folder: Path
    threads: int

    def start(self, words: list[str], cwd: Path) -> str:
        """Run a command of this commit's code to its end; returns what it printed."""
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        env |= {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": str(self.threads)}
        ended = subprocess.run(
            words, cwd=cwd, env=env, capture_output=True, text=True, timeout=LONGEST, check=False
        )
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or ["no message"]
            said = [line for line in lines if line.startswith("mmscale:")] or lines
            raise FailedError(f"ended with {ended.returncode}: {said[-1]}")
        return ended.stdout

    def make_pairs(self) -> None:
        """Render and pack the pairs that all runs train on, by the commit's own code."""
        self.folder.mkdir(parents=True)
        imported = self.start(
            [sys.executable, "-c", "import mmscale; print(mmscale.__file__)"], self.folder
        )
        if not Path(imported.strip()).is_relative_to(self.code):
            raise FailedError(f"{self.code}: its code is hidden by {imported.strip()}")
        project = tomllib.loads((self.code / "pyproject.toml").read_text("utf-8"))["project"]
        module, function = project["scripts"]["mmscale"].split(":")
        verb = [sys.executable, "-c", f"from {module} import {function}; {function}()"]
        size = ["--images", str(IMAGES), "--size", str(SIDE), "--seed", "0"]
        self.start([*verb, "synth", "--out", "source", *size], self.folder)
        pack = ["pack", "source", "--out", "packed", "--samples-per-shard", "50"]
        self.start([*verb, *pack], self.folder)
        (self.folder / "small.yaml").write_text(SMALL, "utf-8")

    def train(self, kind: Kind, run: str) -> Path:
        """Start a run, or go on with it; returns its folder."""
        launcher = [sys.executable]
        if kind.ranks > 1:
            ranks = ["--nproc_per_node", str(kind.ranks)]
            launcher += ["-m", "torch.distributed.run", "--standalone", *ranks]
        folder = self.folder / "runs" / run
        words = [str(self.folder / "small.yaml") if kind.preset is None else kind.preset]
        packed = self.folder / "packed"
        words += [f"data.train={packed / 'train'}", f"data.eval={packed / 'val'}"]
        words += [word.replace("features", str(self.folder / "features")) for word in kind.words]
        command = [*launcher, str(self.code / "mmscale" / "train.py"), *words]
        self.start([*command, f"run.dir={folder}"], self.code)
        return folder

    def go_on(self, kind: Kind, run: str) -> Path:
        """A run from its checkpoint in the middle to its end, in a copy of its folder."""
        runs = self.folder / "runs"
        folder = shutil.copytree(runs / run, runs / f"{run}-resumed")
        middle = f"step-{kind.middle:08d}"
        checkpoints = sorted((folder / "checkpoints").iterdir())
        if middle not in [path.name for path in checkpoints]:
            raise FailedError(f"has no checkpoint {middle}")
        for path in checkpoints:
            if path.name > middle:
                shutil.rmtree(path)
        return self.train(kind, folder.name)


Logged = dict[tuple[int, str], Any]


def logged(run: Path, fields: str) -> Logged:
    """The compared figures of a run's log by step and name."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return {
        (line.get("step", -1), name): value
        for line in map(json.loads, lines)
        for name, value in line.items()
        if re.fullmatch(fields, name)
    }


def difference(wanted: Logged, got: Logged) -> str:
    """The first figure that is not the same, or how many are."""
    absent = "absent"
    for step, name in sorted(wanted.keys() | got.keys()):
        ours, theirs = (found.get((step, name), absent) for found in (got, wanted))
        # As text: NaN equals itself, and -0.0 is not 0.0.
        if repr(ours) != repr(theirs):
            return f"**{name} of step {step}: {theirs!r} became {ours!r}**"
    return f"equal ({len(wanted):,} figures)" if wanted else "**nothing logged**"


def compared(base: Commit, head: Commit, name: str, fields: str) -> tuple[str, str]:
    """A row of the table: BASE's run against HEAD's, and against HEAD's that was resumed."""
    kind, cells = KINDS[name], []
    try:
        wanted = logged(base.train(kind, name), fields)
    except FailedError as error:
        return f"**BASE {error}**", ""
    for start in (head.train, head.go_on):
        try:
            cells.append(difference(wanted, logged(start(kind, name), fields)))
        except (FailedError, FileNotFoundError) as error:
            cells.append(f"**HEAD {error}**")
    return cells[0], cells[1]


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """A commit in a work tree of its own, for as long as it is needed."""
    subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", folder, revision], cwd=ROOT, check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="commit whose figures are the right ones")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit that must give the same")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--fields", default=FIELDS, help="names that are compared, a pattern")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="same-bits-") as name,
        checked_out(given.base, Path(name, "base")) as old,
        checked_out(given.head, Path(name, "head")) as new,
        ThreadPoolExecutor(given.jobs) as pool,
    ):
        base = Commit(old, Path(name, "base-runs"), given.threads)
        head = Commit(new, Path(name, "head-runs"), given.threads)
        list(pool.map(Commit.make_pairs, (base, head)))
        rows = {
            run: pool.submit(compared, base, head, run, given.fields)
            for run in dict(KINDS)
            if run in given.only
        }
        print(f"| run | {given.head} | resumed |\n|---|---|---|", flush=True)
        for run, row in rows.items():
            print(f"| {run} | {' | '.join(row.result())} |", flush=True)
    same = all(cell.startswith("equal") for row in rows.values() for cell in row.result())
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
