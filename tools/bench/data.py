"""Samples a second from shards to batches: ours, open_clip's and the limit.

All three read the same shards of 500 x 375 JPEGs and make 224-pixel crops with as many processes.
They take turns, each in a fresh process, so that what disturbs the machine disturbs all of them.
"""

import csv
import io
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from mmscale.data.manifest import read_manifest
from mmscale.data.pack import PackSettings, pack
from mmscale.data.scenes import draw_scene, paint
from mmscale.data.synth import describe_scene
from mmscale.errors import LaunchError
from tools.bench.results import Result, peers_folder

WIDTH, HEIGHT = 500, 375
# At this quality photographs of this size take about 2 bits a pixel, and so do the scenes, by their
# grain: smooth pictures would decode faster than any photograph.
QUALITY = 90
SIDES = ("limit", "ours", "peer")


def run() -> list[Result]:
    """Measure with as many samples as steady figures need: about ten minutes."""
    with TemporaryDirectory() as folder:
        return measure(prepare(Path(folder), 768), 256, 4, 8, 5, (1, 2))


def measure(
    shards: Path, batch: int, warm: int, count: int, rounds: int, workers: tuple[int, ...]
) -> list[Result]:
    """Rates of all three sides.

    Args:
        shards: A packed folder.
        batch: Rows of a batch.
        warm: Batches a worker that are not timed.
        count: Batches a worker that are.
        rounds: Turns of each side; the medians count.
        workers: Numbers of decoding processes.
    """
    results = []
    for processes in workers:
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(rounds):
            for side in SIDES:
                batches = (warm * processes, count * processes)
                rates[side].append(_rate(side, shards, processes, batch, *batches))
                shown = f"{side} {rates[side][-1]:,.0f} samples/s"
                sys.stderr.write(f"{processes} workers, round {turn + 1}: {shown}\n")
        results.append(_result(rates, read_manifest(shards).samples, processes))
    return results


def prepare(folder: Path, images: int) -> Path:
    """Pictures rendered and packed into eight shards."""
    render(folder / "pictures", images)
    settings = PackSettings(split="train", samples_per_shard=-(-images // 8))
    pack(folder / "pictures", folder / "shards", settings)
    return folder / "shards"


def render(folder: Path, images: int) -> None:
    """Scenes of a photograph's size and weight, with a csv of captions."""
    folder.mkdir(parents=True)
    rows = [("image", "caption", "split")]
    for index in range(images):
        scene = draw_scene(0, index)
        square = Image.open(io.BytesIO(paint(scene, WIDTH, 95, (0, index))))
        picture = square.crop((0, 0, WIDTH, HEIGHT))
        picture.save(folder / f"{index:06d}.jpg", quality=QUALITY)
        rows += [
            (f"{index:06d}.jpg", text, "train") for text in describe_scene(scene, f"0/{index}", 0.0)
        ]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _rate(side: str, shards: Path, workers: int, batch: int, warm: int, count: int) -> float:
    words = [side, shards, workers, batch, warm, count]
    # As in training; every side gets the same.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    if side == "peer":
        environment["PYTHONPATH"] = str(peers_folder())
    command = [sys.executable, "-m", "tools.bench.data_sides", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        raise LaunchError(f"bench data: its process for {side} failed: {lines[-1]}")
    return batch * count / float(ended.stdout.split()[-1])


def _result(rates: dict[str, list[float]], images: int, workers: int) -> Result:
    ours, peer, limit = (statistics.median(rates[side]) for side in ("ours", "peer", "limit"))
    return Result(
        name=f"data, {workers} worker{'s' * (workers > 1)}",
        metric="samples_per_second",
        n=images,
        ranks=1,
        device="cpu",
        ours=ours,
        peer=peer,
        ratio=ours / peer,
        limit=limit,
    )
