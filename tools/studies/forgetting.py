"""A world that forgets: what fine-tuning gains on new scenes and loses on old ones.

python -m tools.studies.forgetting [--seeds 3] [--out runs/studies/forgetting]

Scenes whose things have four of the eight shapes are the old world, those with the other four the
new one; scenes with both are left out. A small model is trained on the old world, then on the new
one: plainly, within a budget, and with terms that hold it near its start. All figures are points of
mean recall, of images that no run was trained on; those with a budget are of the point that it
chose. Goes on where it stopped.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.data.scenes import SHAPES, draw_scene
from mmscale.data.synth import SynthSettings, image_name, render
from mmscale.errors import explained

IMAGES, SIDE, HELD_OUT = 8000, 64, 250
WORLDS = {"old": frozenset(SHAPES[:4]), "new": frozenset(SHAPES[4:])}
BUDGET = 2.0
TOWERS = (
    "model.vision.options={embed_dim: 96, depth: 3, num_heads: 4, class_token: false, "
    "global_pool: avg}",
    "model.text.options={width: 96, layers: 2, heads: 4, context_length: 48}",
    f"data.image_size={SIDE}",
    "model.embed_dim=96",
    "log.page=false",
    "probe.every=1000 steps",
)
NEAR = "loss.terms=[{kind: infonce}, {kind: anchor, weight: %s}]"
# How the new world is learnt: what is said besides the common words.
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "budget": (f"retain.budget={BUDGET}",),
    "budget, a tenth of the rate": (f"retain.budget={BUDGET}", "optim.lr=1e-4"),
    "budget, anchor": (f"retain.budget={BUDGET}", NEAR % 1.0),
}

app = typer.Typer(add_completion=False)


def make_worlds(out: Path, seed: int) -> None:
    """Render and pack both worlds, each with `train` and `val`."""
    if (out / "new" / "val").exists():
        return
    render(out / "scenes", SynthSettings(IMAGES, seed, SIDE), 2)
    told = json.loads((out / "scenes" / "dataset_flickr30k.json").read_text("utf-8"))
    entries = {entry["filename"]: entry for entry in told["images"]}
    for world, shapes in WORLDS.items():
        names = [
            image_name(seed, index)
            for index in range(IMAGES)
            if {thing.shape for thing in draw_scene(seed, index).things} <= shapes
        ]
        kept = [dict(entries[name]) for name in names]
        for place, entry in enumerate(kept):
            entry["split"] = "val" if place < HELD_OUT else "train"
        listed = out / "scenes" / f"{world}.json"
        listed.write_text(json.dumps({"images": kept, "dataset": world}), "utf-8")
        _mmscale("pack", listed, "--images", out / "scenes" / "images", "--out", out / world)


def _mmscale(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "mmscale.cli", *map(str, words)], check=True)


def learn_old(out: Path, steps: int, seed: int) -> Path:
    """Train on the old world; returns the run."""
    run = out / "before"
    if not (run / "doctor.json").exists():
        data = (f"data.train={out}/old/train", f"data.eval={out}/old/val")
        _train(run, *data, f"train.duration={steps} steps", f"run.seed={seed}", "eval.every=null")
    return run


def learn_new(out: Path, way: str, before: Path, steps: int, seed: int) -> dict[str, float]:
    """Train on the new world in one of `WAYS`; returns gain and loss."""
    run = out / way.replace(", ", "-").replace(" ", "-")
    if not (run / "doctor.json").exists():
        _train(
            run,
            f"data.train={out}/new/train",
            f"data.eval={out}/new/val",
            f"eval.sets={{old: {{data: {out}/old/val}}}}",
            "retain.sets=[old]",
            f"train.duration={steps} steps",
            f"model.weights={before}",
            f"run.seed={seed}",
            "eval.every=null",
            *WAYS[way],
        )
    log = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    last = next(line for line in map(json.loads, reversed(log)) if "retain/lost" in line)
    found = {"gain": last["retain/gain"], "lost": last["retain/lost"], "share": 1.0}
    if (run / "retention.json").exists():
        line = json.loads((run / "retention.json").read_text("utf-8"))
        chosen = next(p for p in line["points"] if p["share"] == line["chosen"])
        found |= {name: chosen[name] for name in ("gain", "lost", "share")}
    return found


def _train(run: Path, *words: str) -> None:
    common = ("run.resume=auto", "checkpoint.keep=1", f"run.dir={run}")
    _mmscale("train", "demo", *TOWERS, *common, *words)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Rows of ways: mean and deviation over seeds."""
    rows = []
    for way, runs in found.items():
        columns = {name: [run[name] for run in runs] for name in ("gain", "lost", "share")}
        kept = [
            run["gain"] / plain["gain"] for run, plain in zip(runs, found["plain"], strict=False)
        ]
        rows.append([way, *(_spread(columns[name]) for name in columns), _spread(kept, ".0%")])
    head = ["way", "gained on new", "lost on old", "share of the last weights", "of plain's gain"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: list[float], form: str = ".1f") -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


@app.command()
def study(
    seeds: Annotated[int, typer.Option(help="Worlds and models.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path(
        "runs/studies/forgetting"
    ),
    before: Annotated[int, typer.Option(help="Updates on the old world.", min=1)] = 600,
    after: Annotated[int, typer.Option(help="Updates on the new world.", min=1)] = 300,
) -> int:
    """Train, fine-tune, and print the table."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        make_worlds(folder, seed)
        run = learn_old(folder, before, seed)
        for way in WAYS:
            found[way].append(learn_new(folder, way, run, after, seed))
            sys.stderr.write(f"seed {seed}, {way}: {found[way][-1]}\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(explained(lambda: app(standalone_mode=False) or 0))
