"""One side of the step on a card, in a process of its own: prints its figures as JSON.

Started as `python -m tools.gpu.step_side SIDE DEVICE ROWS CHUNKS TOKENS STEPS [KERNELS]`. The sides
train the same towers with random weights on the same rows, which lie on the device, in bf16 with
AdamW and clipping at 1; the peer is the loop of open_clip's own trainer. With KERNELS, a file, a
table of the operations of three more updates is written there.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from mmscale.config.load import validate
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.parallel.device import choose, memory_peak
from tools.bench.step_sides import (
    OPTIM,
    RATE,
    Loaded,
    batch_of,
    make_rows,
    peer_arguments,
    peer_optimizer,
)

# By device: a real model on a card, and one that shows on a CPU that the program runs.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"name": "ViT-B-16", "image": 224, "embed": 512, "vision": {}, "text": {}},
    "cpu": {
        "name": "ViT-B-16",
        "image": 32,
        "embed": 64,
        "vision": {"width": 64, "layers": 2, "head_width": 32, "patch_size": 8, "image_size": 32},
        "text": {"width": 64, "layers": 2, "heads": 2},
    },
}
# Compiling, choosing kernels and filling the allocator are over after so many updates.
WARM_STEPS = 6

Run = Callable[[int], None]


def main(side: str, device: str, rows: int, chunks: int, tokens: int, steps: int) -> Run:
    """Measure `steps` updates after a few others, and print the figures."""
    flops, where = flops_of(device, rows, tokens), torch.device(device)
    peak = choose(config_of(device, rows).engine).peak_flops
    run = SIDES[side](device, rows, chunks, tokens)
    run(WARM_STEPS)
    start = time.perf_counter()
    run(steps)
    seconds = (time.perf_counter() - start) / steps
    figures = {
        "time_s": seconds,
        "samples_per_second": rows / seconds,
        "memory_bytes": memory_peak(where),
        "mfu": None if peak is None else flops / seconds / peak,
        "flops": flops,
    }
    print(json.dumps(figures))
    return run


def table_of_kernels(run: Run, path: Path) -> None:
    """What three updates spend their time on, the longest first."""
    with profile() as seen:
        run(3)
    sort = "self_device_time_total" if torch.accelerator.is_available() else "self_cpu_time_total"
    path.write_text(seen.key_averages().table(sort_by=sort, row_limit=30), "utf-8")


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def rows_on(device: str, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The rows of `make_rows`, on the device."""
    pixels, ids = make_rows(rows, tokens, 0, SIZES[device]["image"])
    return pixels.to(device), ids.to(device)


def config_of(device: str, rows: int) -> Config:
    """Of ours."""
    size = SIZES[device]
    tower = {"name": f"openclip:{size['name']}", "weights": "random"}
    return validate(
        {
            "data": {"train": "none"},
            "model": {
                "vision": {**tower, "options": size["vision"]},
                "text": {**tower, "options": size["text"]},
                "embed_dim": size["embed"],
            },
            "train": {"global_batch_size": rows},
            "optim": OPTIM,
            "engine": {"device": device, "precision": "bf16"},
        }
    )


def flops_of(device: str, rows: int, tokens: int) -> float:
    """Of one update of either side, counted on the CPU."""
    from mmscale.engine.footprint import count_flops
    from mmscale.model.build import build_model

    model, spec = build_model(config_of(device, rows).model, None, 0)
    return count_flops(model.train(), spec).update(rows, tokens)


def ours(device: str, rows: int, chunks: int, tokens: int, compiled: bool = False) -> Run:
    """Our update on one device: what runs some of them."""
    from mmscale.checkpoint.state import RunState
    from mmscale.engine.accelerate import AccelerateEngine
    from mmscale.engine.compiled import compile_blocks
    from mmscale.loss.objective import Objective
    from mmscale.model.build import build_model
    from mmscale.parallel.peers import Alone
    from mmscale.training.part import Step
    from mmscale.training.step import Learner, launch

    config = config_of(device, rows)
    model, _ = build_model(config.model, None, 0)
    if compiled:
        compile_blocks([model.vision, model.text])
    engine = AccelerateEngine(model.train(), config, choose(config.engine), World())
    batch = batch_of(*rows_on(device, rows, tokens), tokens)
    learner = Learner(engine, Objective(config, Alone()), Alone(), rows // chunks)

    def run(steps: int) -> None:
        before = None
        for step in range(steps):
            launched = launch(learner, batch, Step(RunState(step), RATE, is_measured=False))
            if before is not None:
                before.result(overtaken=True)
            before = launched
        _wait(device)

    return run


def ours_compiled(device: str, rows: int, chunks: int, tokens: int) -> Run:
    """The same with `engine.compile=blocks`."""
    return ours(device, rows, chunks, tokens, compiled=True)


def open_clip(device: str, rows: int, chunks: int, tokens: int, compiled: bool = False) -> Run:
    """`train_one_epoch` of open_clip_train, set up as its `main` does, with `amp_bf16`."""
    import open_clip as library
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    size = SIZES[device]
    settings = library.get_model_config(size["name"])
    torch.manual_seed(0)
    model: Any = library.CLIP(
        size["embed"],
        {**settings["vision_cfg"], **size["vision"]},
        {**settings["text_cfg"], **size["text"]},
        output_dict=True,
    ).to(device)
    optimizer = peer_optimizer(model)
    trained = torch.compile(model) if compiled else model
    arguments = peer_arguments(World(), rows, chunks, device, "amp_bf16")
    batches = list(zip(*(x.chunk(chunks) for x in rows_on(device, rows, tokens)), strict=True))
    loss = ClipLoss(cache_labels=True)

    def run(steps: int) -> None:
        data = {"train": Loaded(batches * steps, rows * steps)}
        train_one_epoch(trained, data, loss, 0, optimizer, None, None, None, arguments)
        _wait(device)

    return run


def open_clip_compiled(device: str, rows: int, chunks: int, tokens: int) -> Run:
    """The same with `--torchcompile`."""
    return open_clip(device, rows, chunks, tokens, compiled=True)


SIDES = {
    "ours": ours,
    "ours_compiled": ours_compiled,
    "open_clip": open_clip,
    "open_clip_compiled": open_clip_compiled,
}

if __name__ == "__main__":
    words = sys.argv[1:]
    measured = main(words[0], words[1], *map(int, words[2:6]))
    if len(words) > 6:
        table_of_kernels(measured, Path(words[6]))
