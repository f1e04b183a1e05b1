"""Streams one epoch of a packed folder as training does: first batch, rate, memory along the way.

python tools/measure_stream.py FOLDER [WORKERS] [BATCH] [STEPS]

Crops of 224 pixels with the CLIP tokenizer, no model. Memory is the proportional set size of this
process and its workers (each shared page counted once), Linux only.
"""

import sys
import time
from itertools import islice
from pathlib import Path

from mmscale.config.load import load_config
from mmscale.contracts import InputSpec, Position, World
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards
from mmscale.data.stream import TrainStream
from mmscale.engine.plan import plan_batch
from mmscale.model.openclip_towers import read_tokenize

SIZE = 224
SAMPLES = 20  # of memory, over the epoch


def main(words: list[str]) -> None:
    folder = words[0]
    workers = int(words[1]) if len(words) > 1 else 2
    batch_size = int(words[2]) if len(words) > 2 else 256
    most = int(words[3]) if len(words) > 3 else None
    config = load_config(
        [
            "demo",
            f"data.train={folder}",
            f"data.workers={workers}",
            f"data.image_size={SIZE}",
            f"train.global_batch_size={batch_size}",
        ]
    )
    tokenize, pad_token = read_tokenize("ViT-B-32", 77, {})
    spec = InputSpec(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", tokenize, pad_token, 77)
    start = time.perf_counter()
    shards = open_shards("data.train", config.data.train)
    schedule = plan_schedule(config, shards, plan_batch(config, 1).lanes)
    stream = TrainStream(config, shards, schedule, spec, World()).batches(Position())
    next(stream)
    first = time.perf_counter() - start
    print(f"{len(shards.shards):,} shards, {shards.samples:,} images, {workers} workers")
    print(f"first batch {first:.2f} s after opening")
    begun, rows, memory, damaged = time.perf_counter(), 0, [], 0
    steps = schedule.steps if most is None else min(most, schedule.steps)
    every = max(1, steps // SAMPLES)
    for step, (batch, _) in enumerate(islice(stream, steps - 1), start=2):
        rows, damaged = rows + len(batch), damaged + len(batch.damaged)
        if step % every == 0:
            memory.append(megabytes())
            seconds = time.perf_counter() - begun
            print(f"step {step}/{steps}: {memory[-1]:,.0f} MB, {rows / seconds:,.0f}/s")
    seconds = time.perf_counter() - begun
    print(f"in all: {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} samples/s")
    half = len(memory) // 2
    print(
        f"memory: first half at most {max(memory[:half]):,.0f} MB, "
        f"second half at most {max(memory[half:]):,.0f} MB; {damaged} damaged"
    )


def megabytes() -> float:
    """Memory of this process and of those that it started."""
    me = Path("/proc/self")
    children = [pid for task in me.glob("task/*/children") for pid in task.read_text().split()]
    total = 0
    for process in (me, *(Path("/proc") / pid for pid in children)):
        lines = (process / "smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


if __name__ == "__main__":
    main(sys.argv[1:])
