"""A world that forgets: what fine-tuning gains on new scenes and loses on old ones.

python -m tools.studies.forgetting [--seeds 3] [--out runs/studies/forgetting]
python -m tools.studies.forgetting --photographs FLICKR8K --before 100 --after 200 key=value ...

Four of the eight shapes in four of the eight colours are the old world, the other four of each the
new one; of photographs with Flickr8k's captions, those with a dog are the old world. A small model
(of photographs, heads above frozen towers that the words name) is trained on the old world, then on
the new one: plainly, within a budget, near its start, with old pairs held where they were, and
beside some old pairs. All figures are points of mean recall, of images that no run was trained on;
those with a budget are of the point that it chose. Goes on where it stopped.
"""

import csv
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from mmscale.data.scenes import COLOURS, SHAPES, Scene, draw_scene, paint
from mmscale.data.synth import describe_scene
from mmscale.errors import explained

IMAGES, SIDE, QUALITY, HELD_OUT = 1500, 64, 90, 250
Looks: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
WORLDS: dict[str, Looks] = {
    "old": (SHAPES[:4], tuple(COLOURS)[:4]),
    "new": (SHAPES[4:], tuple(COLOURS)[4:]),
}
BUDGET = 2.0
TOWERS = (
    "demo",
    "model.vision.options={embed_dim: 96, depth: 3, num_heads: 4, class_token: false, "
    "global_pool: avg}",
    "model.text.options={width: 96, layers: 2, heads: 4, context_length: 48}",
    f"data.image_size={SIDE}",
    "model.embed_dim=96",
    "probe.every=1000 steps",
)
# Old pairs that are held where they were and not contrasted.
HELD = "loss.terms=[{kind: infonce}, {kind: anchor, data: OUT/old/train, rows: 64, weight: 10}]"
NEAR = "loss.terms=[{kind: infonce}, {kind: anchor, weight: %s}]"
# The same number of updates, some of whose rows are of the old world.
BOTH = "data.train=[{shards: OUT/new/train}, {shards: OUT/old/train, weight: %s}]"
# How the new world is learnt: what is said besides the common words.
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "budget": (f"retain.budget={BUDGET}",),
    "budget, a third of the rate": (f"retain.budget={BUDGET}", "optim.lr=3e-4"),
    "budget, anchor": (f"retain.budget={BUDGET}", NEAR % 1.0),
    "budget, old pairs held": (f"retain.budget={BUDGET}", HELD),
    "budget, a fifth of the old pairs": (f"retain.budget={BUDGET}", BOTH % 0.2),
    "budget, half of the old pairs": (f"retain.budget={BUDGET}", BOTH % 0.5),
}

app = typer.Typer(add_completion=False)
# Images in their order with their captions; the first ones are held out.
Captioned: TypeAlias = dict[str, list[str]]


def paint_worlds(out: Path, seed: int) -> None:
    """Paint and pack both worlds, each with `train` and `val`."""
    for world, looks in WORLDS.items():
        images = out / "scenes" / world
        images.mkdir(parents=True, exist_ok=True)
        captioned: Captioned = {}
        for index, scene in islice(_scenes(seed, looks), IMAGES):
            name = f"{index}.jpg"
            (images / name).write_bytes(paint(scene, SIDE, QUALITY, (seed, index)))
            captioned[name] = describe_scene(scene, f"{seed}/{index}")
        _pack(out / world, images, captioned)


def split_photographs(out: Path, photographs: Path, seed: int) -> None:
    """Pack photographs with a dog, and those without, each with `train` and `val`.

    Three of an image's captions name the dog, or none does; other images are left out.
    """
    captioned: Captioned = {}
    for line in (photographs / "token.txt").read_text("utf-8").splitlines():
        name, _, caption = line.partition("\t")
        captioned.setdefault(name.partition("#")[0], []).append(caption)
    names = sorted(captioned)
    random.Random(seed).shuffle(names)
    named = {name: sum("dog" in caption.lower() for caption in captioned[name]) for name in names}
    worlds = {"old": lambda times: times >= 3, "new": lambda times: times == 0}
    for world, is_of in worlds.items():
        kept = {name: captioned[name] for name in names if is_of(named[name])}
        _pack(out / world, photographs / "images", kept)


def _pack(out: Path, images: Path, captioned: Captioned) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = out.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "split"])
        for place, (name, captions) in enumerate(captioned.items()):
            split = "val" if place < HELD_OUT else "train"
            rows.writerows([name, caption, split] for caption in captions)
    _mmscale("pack", table, "--images", images, "--out", out)


def _scenes(seed: int, looks: Looks) -> Iterator[tuple[int, Scene]]:
    """Scenes all of whose things have these shapes and colours."""
    shapes, colours = looks
    for index in count():
        scene = draw_scene(seed, index)
        if all(thing.shape in shapes and thing.colour in colours for thing in scene.things):
            yield index, scene


def _mmscale(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "mmscale.cli", *map(str, words)], check=True)


def learn_old(out: Path, steps: int, common: Sequence[str]) -> Path:
    """Train on the old world; returns the run."""
    run = out / "before"
    if not (run / "doctor.json").exists():
        data = (f"data.train={out}/old/train", f"data.eval={out}/old/val")
        _train(run, *common, *data, f"train.duration={steps} steps")
    return run


def learn_new(
    out: Path, way: str, before: Path, steps: int, common: Sequence[str]
) -> dict[str, float]:
    """Train on the new world in one of `WAYS`; returns gain and loss."""
    run = out / way.replace(", ", "-").replace(" ", "-")
    if not (run / "doctor.json").exists():
        _train(
            run,
            *common,
            f"data.train={out}/new/train",
            f"data.eval={out}/new/val",
            f"eval.sets={{old: {{data: {out}/old/val}}}}",
            "retain.sets=[old]",
            f"train.duration={steps} steps",
            f"model.weights={before}",
            *(word.replace("OUT", str(out)) for word in WAYS[way]),
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
    always = ("eval.every=null", "checkpoint.keep=1", "log.page=false", f"run.dir={run}")
    _mmscale("train", *words, *always)


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def study(
    context: typer.Context,
    photographs: Annotated[
        Path | None, typer.Option(help="A folder with Flickr8k's images/ and token.txt.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Worlds and models.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path(
        "runs/studies/forgetting"
    ),
    before: Annotated[int, typer.Option(help="Updates on the old world.", min=1)] = 600,
    after: Annotated[int, typer.Option(help="Updates on the new world.", min=1)] = 300,
) -> int:
    """Train, fine-tune, and print the table; every run shares the words."""
    # Towers of photographs rest on kept features, which held pairs do not have.
    ways = [way for way in WAYS if photographs is None or HELD not in WAYS[way]]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        if not (folder / "new" / "val").exists():
            if photographs is None:
                paint_worlds(folder, seed)
            else:
                split_photographs(folder, photographs, seed)
        towers = TOWERS if photographs is None else ("flickr8k",)
        common = (*towers, f"run.seed={seed}", *context.args)
        if photographs is not None:
            common = (*common, f"data.feature_cache={folder}/features")
        run = learn_old(folder, before, common)
        for way in ways:
            found[way].append(learn_new(folder, way, run, after, common))
            sys.stderr.write(f"seed {seed}, {way}: {found[way][-1]}\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(explained(lambda: app(standalone_mode=False) or 0))
