"""Everything that only a card can show, in parts: `python -m tools.gpu [PART...]`, or `make gpu`.

Needs a CUDA device and python with the packages of mmscale; `tools/gpu/wheels.sh` fetches those
that a machine without a package registry lacks. Each command that is started ends within eight
minutes. What is measured goes into `runs/gpu/PART.json`, and `docs/results/gpu.md` is written from
all that is there.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.bench.results import shown

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 480
SIDES = ("ours", "ours_compiled", "open_clip", "open_clip_compiled")
# Rows, chunks and tokens of a case, and updates that are measured.
CASES = {"cuda": ((512, 1, 77, 20), (2048, 4, 77, 6), (512, 1, 24, 20)), "cpu": ((8, 2, 77, 2),)}

app = typer.Typer(add_completion=False)


@app.command()
def gpu(
    parts: Annotated[
        list[str] | None, typer.Argument(help="tests, step, loss; all of them.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu: tiny sizes, which show that the program runs.")
    ] = "cuda",
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "runs" / "gpu",
    page: Annotated[Path, typer.Option(help="The page with the tables.")] = (
        ROOT / "docs" / "results" / "gpu.md"
    ),
) -> None:
    """Run the tests of tests/gpu, then measure a step and a loss against open_clip."""
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in parts or list(PARTS):
        begin = time.perf_counter()
        found = PARTS[part](device, out)
        found |= {**_where(device), "seconds": round(time.perf_counter() - begin)}
        (out / f"{part}.json").write_text(json.dumps(found, indent=1), "utf-8")
        print(json.dumps(found, indent=1), flush=True)
        if found.get("exit"):
            failed.append(part)
    page.write_text(_page(out), "utf-8")
    if failed:
        raise typer.Exit(1)


def run_tests(device: str, out: Path) -> dict[str, Any]:
    """`tests/gpu`; where there is no card they are skipped."""
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    ended = _run([sys.executable, *words], LIMIT_SECONDS)
    (out / "tests.txt").write_text(ended.stdout + ended.stderr, "utf-8")
    # 5: none was collected.
    return {"exit": ended.returncode, "last_line": (ended.stdout.splitlines() or [""])[-1]}


def run_step(device: str, out: Path) -> dict[str, Any]:
    """Each side of each case, in turn; a side that does not fit or fails has its reason."""
    results = []
    for rows, chunks, tokens, steps in CASES[device]:
        for side in SIDES:
            words = [side, device, *map(str, (rows, chunks, tokens, steps))]
            if (rows, chunks, tokens, steps) == CASES[device][0]:
                words.append(str(out / f"kernels-{side}.txt"))
            ended = _run([sys.executable, "-m", "tools.gpu.step_side", *words], LIMIT_SECONDS)
            case = {"side": side, "rows": rows, "chunks": chunks, "tokens": tokens}
            results.append(case | _figures(ended))
    return {"results": results, "exit": int(any("error" in result for result in results))}


def run_loss(device: str, out: Path) -> dict[str, Any]:
    """`bench loss` on the card."""
    file = out / "bench-loss.json"
    words = ["-m", "tools.bench", "loss", "--device", device, "--json", str(file)]
    ended = _run([sys.executable, *words], LIMIT_SECONDS)
    if ended.returncode:
        return {"exit": ended.returncode, "error": ended.stderr[-2000:]}
    results: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return results


PARTS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "tests": run_tests,
    "step": run_step,
    "loss": run_loss,
}


def _run(words: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        return subprocess.run(
            words, cwd=ROOT, env=environment, timeout=limit, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"longer than {limit:.0f} s")


def _figures(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or ["no message"])[-1]}
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def _where(device: str) -> dict[str, Any]:
    """Card, date and commit of what is measured."""
    import torch

    from mmscale.parallel.device import this_machine

    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpus = this_machine().gpus
    card = gpus[0].name if device == "cuda" and gpus else "a CPU"
    return {
        "card": card,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "torch": torch.__version__,
    }


def _page(out: Path) -> str:
    """What the parts have left, as a page."""
    lines = ["# On a card", "", "Written by `make gpu`."]
    for part in PARTS:
        file = out / f"{part}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text("utf-8"))
        lines += ["", f"## {part.capitalize()}", ""]
        lines += [
            f"{found['card']}, torch {found['torch']}, {found['date']}, commit {found['commit']}.",
            "",
        ]
        results = found.get("results")
        lines += _table(results) if results else [found.get("last_line") or found.get("error", "")]
    return "\n".join(lines) + "\n"


def _table(results: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result))
    cells = [[shown(result.get(name)) for name in names] for result in results]
    rule = ["---"] * len(names)
    return [f"| {' | '.join(row)} |" for row in (names, rule, *cells)]


if __name__ == "__main__":
    app()
