"""the study `parity`: one run through every engine, sharding and cut of the batch, compared.

Each cell is a real launch: python, torchrun or deepspeed. In fp32 their losses must be those of one
process, step by step.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmscale.errors import LaunchError
from mmscale.report.metrics import read_metrics
from tools.studies.cells import Cell, Figures, Result
from tools.studies.experiments import with_defaults
from tools.studies.table import Table, table_of
from tools.studies.trained import folder_words

TRAIN = Path(__file__).resolve().parents[2] / "mmscale" / "train.py"
DEFAULTS = (
    "train.duration=20 steps",
    "train.global_batch_size=32",
    "optim.warmup=5 steps",
    "data.eval=null",
    "checkpoint.every=null",
    "engine.precision=fp32",
)
ALONE = "accelerate, 1 rank"
# Ranks, and the DeepSpeed file.
ENGINES: dict[str, tuple[int, str | None]] = {
    ALONE: (1, None),
    "accelerate, 2 ranks": (2, None),
    "ZeRO-1, 2 ranks": (2, "zero1"),
    "ZeRO-2, 2 ranks": (2, "zero2"),
    "ZeRO-3, 2 ranks": (2, "zero3"),
    "ZeRO-3 + offload, 2 ranks": (2, "zero3_offload"),
}
PLAIN, QUEUE = "plain", "queue"
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "chunked": ("train.micro_batch_size=4",),
    # No multiple of the batch, and full only after some steps.
    QUEUE: ("negatives.queue.size=100",),
}
TOLERANCE = 1e-4
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def cells(words: tuple[str, ...], seeds: Iterable[int]) -> list[Cell]:
    """Every engine with every variant; of the seeds the first: it is the runs that must agree."""
    words = (*with_defaults(words, DEFAULTS), f"run.seed={next(iter(seeds))}")
    found = []
    for engine, (_, file) in ENGINES.items():
        sharding = () if file is None else (f"engine.deepspeed=ds_configs/{file}.json",)
        for variant, extra in VARIANTS.items():
            labels = {"engine": engine, "variant": variant}
            found.append(Cell(labels, (*words, *extra, *sharding)))
    return found


def measure(cell: Cell, folder: Path) -> Figures:
    """Launch the run; its losses and the digests of its keys.

    Raises:
        LaunchError: It failed.
    """
    command = [*_launcher(*ENGINES[cell.labels["engine"]]), TRAIN, *cell.words]
    ended = subprocess.run(
        [*map(str, command), *folder_words(folder)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in LAUNCHERS},
        check=False,
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        said = [line for line in lines if line.startswith("mmscale:")] or lines
        raise LaunchError(f"{cell} ended with {ended.returncode}: {said[-1]}")
    lines_ = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    return {
        "losses": [line["loss"] for line in lines_],
        "keys": [line["keys_digest"] for line in lines_],
    }


def _launcher(ranks: int, file: str | None) -> list[str]:
    if file is not None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        # Beside this interpreter, wherever the shell looks for programs.
        program = Path(sys.executable).parent / "deepspeed"
        return [str(program), "--num_gpus", str(ranks), "--master_port", str(port)]
    if ranks > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [sys.executable, *module]
    return [sys.executable]


def page(results: Sequence[Result]) -> str:
    """The table of differences."""
    steps = max((len(r.figures.get("losses", ())) for r in results), default=0)
    return (
        f"Largest difference of a loss in {steps} steps from {ALONE}, in fp32 (limit "
        f"{TOLERANCE:g}; `chunked` against the plain run):\n\n"
        f"{differences_table(results).markdown()}\n"
    )


def differences_table(results: Sequence[Result]) -> Table:
    """Largest difference of each run from one process."""
    return table_of(
        (
            (result.labels["engine"], result.labels["variant"], _shown(result, results))
            for result in results
        ),
        "engine",
    )


def _shown(result: Result, results: Sequence[Result]) -> str:
    apart = difference(result, results)
    if apart is None:
        return "failed"
    losses = result.figures["losses"]
    if result.labels["engine"] == ALONE and result.labels["variant"] != "chunked":
        return f"reference, {losses[0]:.3f} to {losses[-1]:.3f}"
    return f"{apart:.1e}" if apart <= TOLERANCE else f"**{apart:.1e}**"


def difference(result: Result, results: Sequence[Result]) -> float | None:
    """Largest difference from the reference; infinite where other rows were trained on."""
    wanted = QUEUE if result.labels["variant"] == QUEUE else PLAIN
    reference = next(
        (r for r in results if r.labels == {"engine": ALONE, "variant": wanted} and not r.error),
        None,
    )
    if reference is None or result.error is not None:
        return None
    if result.figures["keys"] != reference.figures["keys"]:
        return float("inf")
    pairs = zip(result.figures["losses"], reference.figures["losses"], strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)
