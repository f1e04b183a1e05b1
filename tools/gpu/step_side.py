"""One side of the step on a card, in a process of its own: prints its figures as JSON.

Started as `python -m tools.gpu.step_side SIDE DEVICE ROWS CHUNKS TOKENS STEPS [KERNELS]`. The sides
train the same towers with random weights on the same rows, which lie on the device, in bf16 with
AdamW and clipping at 1; the peer is the loop of open_clip's own trainer. With KERNELS, a file, a
table of the operations of three more updates is written there.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from mmscale.config.load import validate
from mmscale.contracts import Batch, World
from mmscale.parallel.device import choose, memory_peak

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
CONTEXT, VOCABULARY = 77, 49408
RATE, CLIP_NORM, BETAS, EPS, DECAY = 1e-3, 1.0, (0.9, 0.98), 1e-6, 0.2
# Compiling, choosing kernels and filling the allocator are over after so many updates.
WARM_STEPS = 6

Run = Callable[[int], None]


def main(side: str, device: str, rows: int, chunks: int, tokens: int, steps: int) -> Run:
    """Measure `steps` updates after a few others, and print the figures."""
    run, flops, peak = SIDES[side](device, rows, chunks, tokens)
    run(WARM_STEPS)
    where = torch.device(device)
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


def make_rows(device: str, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Pixels as numbers, and captions that end with the largest id and are padded with zeros."""
    draw = torch.Generator().manual_seed(0)
    side = SIZES[device]["image"]
    pixels = torch.randn(rows, 3, side, side, generator=draw)
    ids = torch.zeros(rows, CONTEXT, dtype=torch.int64)
    ids[:, :tokens] = torch.randint(1, VOCABULARY - 1, (rows, tokens), generator=draw)
    ids[:, tokens - 1] = VOCABULARY - 1
    return pixels.to(device), ids.to(device)


def ours(
    device: str, rows: int, chunks: int, tokens: int, compiled: bool = False
) -> tuple[Run, float, float | None]:
    """Our update on one device: what runs some of them, FLOPs of one, and the device's peak."""
    from mmscale.checkpoint.state import RunState
    from mmscale.engine.accelerate import AccelerateEngine
    from mmscale.engine.compiled import compile_blocks
    from mmscale.engine.footprint import count_flops
    from mmscale.loss.objective import Objective
    from mmscale.model.build import build_model
    from mmscale.parallel.peers import Alone
    from mmscale.training.part import Step
    from mmscale.training.step import Learner, launch

    size = SIZES[device]
    tower = {"name": f"openclip:{size['name']}", "weights": "random"}
    config = validate(
        {
            "data": {"train": "none"},
            "model": {
                "vision": {**tower, "options": size["vision"]},
                "text": {**tower, "options": size["text"]},
                "embed_dim": size["embed"],
            },
            "train": {"global_batch_size": rows},
            "optim": {
                "lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY,
                "clip_norm": CLIP_NORM,
            },
            "engine": {"device": device, "precision": "bf16"},
        }
    )  # fmt: skip
    policy = choose(config.engine)
    model, spec = build_model(config.model, None, 0)
    flops = count_flops(model.train(), spec).update(rows, tokens)
    if compiled:
        compile_blocks([model.vision, model.text])
    engine = AccelerateEngine(model, config, policy, World())
    pixels, ids = make_rows(device, rows, tokens)
    trimmed, identity = ids[:, :tokens].contiguous(), torch.arange(rows, device=device)
    batch = Batch(
        image=pixels,
        tokens=trimmed,
        mask=trimmed > 0,
        image_ids=identity,
        match_ids=identity,
        labels=torch.full((rows,), -1, device=device),
        keys=[f"{row}#0" for row in range(rows)],
        captions=[""] * rows,
    )
    learner = Learner(engine, Objective(config, Alone()), Alone(), rows // chunks)

    def run(steps: int) -> None:
        before = None
        for step in range(steps):
            launched = launch(learner, batch, Step(RunState(step), RATE, is_measured=False))
            if before is not None:
                before.result(overtaken=True)
            before = launched
        _wait(device)

    return run, flops, policy.peak_flops


def ours_compiled(
    device: str, rows: int, chunks: int, tokens: int
) -> tuple[Run, float, float | None]:
    """The same with `engine.compile=blocks`."""
    return ours(device, rows, chunks, tokens, compiled=True)


def open_clip(
    device: str, rows: int, chunks: int, tokens: int, compiled: bool = False
) -> tuple[Run, float, float | None]:
    """`train_one_epoch` of open_clip_train, set up as its `main` does, with `amp_bf16`."""
    import open_clip as library
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    _, flops, peak = ours(device, rows, chunks, tokens)
    size = SIZES[device]
    settings = library.get_model_config(size["name"])
    torch.manual_seed(0)
    model: Any = library.CLIP(
        size["embed"],
        {**settings["vision_cfg"], **size["vision"]},
        {**settings["text_cfg"], **size["text"]},
        output_dict=True,
    ).to(device)
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
    decayed = [p for _, p in named if all(p is not other for other in plain)]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}],
        lr=RATE,
        betas=BETAS,
        eps=EPS,
    )
    trained = torch.compile(model) if compiled else model
    arguments = Namespace(
        device=device, precision="amp_bf16", distill=False, accum_freq=chunks, skip_scheduler=True,
        horovod=False, grad_clip_norm=CLIP_NORM, log_every_n_steps=10**9, rank=0, local_rank=0,
        world_size=1, batch_size=rows // chunks, wandb=False, log_local=False,
    )  # fmt: skip
    batches = list(zip(*(x.chunk(chunks) for x in make_rows(device, rows, tokens)), strict=True))
    loss = ClipLoss(cache_labels=True)

    def run(steps: int) -> None:
        data = {"train": _Loaded(batches * steps, rows * steps)}
        train_one_epoch(trained, data, loss, 0, optimizer, None, None, None, arguments)
        _wait(device)

    return run, flops, peak


def open_clip_compiled(
    device: str, rows: int, chunks: int, tokens: int
) -> tuple[Run, float, float | None]:
    """The same with `--torchcompile`."""
    return open_clip(device, rows, chunks, tokens, compiled=True)


class _Loaded:
    """Batches on the device, as open_clip_train takes its data."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], samples: int):
        self.dataloader = self
        self.num_batches, self.num_samples = len(batches), samples
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Nothing is shuffled."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


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
