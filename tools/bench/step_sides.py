"""One side of `bench step` in a process of its own: prints its seconds, bytes and parameters.

Started as `python -m tools.bench.step_sides SIDE ROWS TOKENS CHUNKS STEPS`, alone or by
torchrun on several ranks; `ROWS` are a rank's.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmscale.config.load import validate
from mmscale.contracts import Batch, World
from mmscale.parallel.device import choose
from mmscale.parallel.peers import barrier, connect, gather_objects
from mmscale.parallel.world import join_ranks, leave, promised_world
from tools.bench.loss_sides import Peak

IMAGE, CONTEXT, VOCABULARY, EMBED = 112, 77, 49408, 192
VISION = {"width": 192, "layers": 6, "head_width": 64, "patch_size": 16, "image_size": IMAGE}
TEXT = {"width": 192, "layers": 4, "heads": 3, "context_length": CONTEXT, "vocab_size": VOCABULARY}
RATE, CLIP_NORM, BETAS, EPS, DECAY = 1e-3, 1.0, (0.9, 0.98), 1e-6, 0.2
OPTIM = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "clip_norm": CLIP_NORM}
WARM_STEPS = 2

Run = Callable[[int], None]


def main(side: str, rows: int, tokens: int, chunks: int, steps: int) -> None:
    """Measure `steps` updates after a few others."""
    world = promised_world()
    join_ranks(world, "gloo", 300)
    run, parameters = SIDES[side](world, rows, tokens, chunks)
    run(WARM_STEPS)
    barrier()
    peak = Peak(torch.device("cpu"))
    start = time.perf_counter()
    run(steps)
    seconds = (time.perf_counter() - start) / steps
    # The slowest rank is what an update waits for; what the warm-up left counts as held.
    figures = {
        "time_s": max(gather_objects(world, seconds)),
        "memory_bytes": max(gather_objects(world, peak.bytes())),
        "parameters": parameters,
    }
    if world.is_main:
        print(json.dumps(figures))
    leave()


def make_rows(rows: int, tokens: int, rank: int, side: int = IMAGE) -> tuple[Tensor, Tensor]:
    """Pixels and captions, which end with the largest id and are padded with zeros."""
    draw = torch.Generator().manual_seed(rank)
    pixels = torch.randn(rows, 3, side, side, generator=draw)
    ids = torch.zeros(rows, CONTEXT, dtype=torch.int64)
    ids[:, :tokens] = torch.randint(1, VOCABULARY - 1, (rows, tokens), generator=draw)
    ids[:, tokens - 1] = VOCABULARY - 1
    return pixels, ids


def batch_of(pixels: Tensor, ids: Tensor, tokens: int, first: int = 0) -> Batch:
    """These rows with an image each, captions cut to `tokens`, on the device where they lie."""
    trimmed = ids[:, :tokens]
    identity = torch.arange(first, first + len(ids), device=ids.device)
    return Batch(
        image=pixels,
        tokens=trimmed,
        mask=trimmed > 0,
        image_ids=identity,
        match_ids=identity,
        labels=torch.full_like(identity, -1),
        keys=[f"{index}#0" for index in range(first, first + len(ids))],
        captions=[""] * len(ids),
    )


def ours(
    world: World, rows: int, tokens: int, chunks: int, deepspeed: str | None = None
) -> tuple[Run, int]:
    """`train_step` through DeepSpeed with this file, or without it."""
    from mmscale.checkpoint.state import RunState
    from mmscale.engine.build import build_engine
    from mmscale.engine.plan import plan_batch
    from mmscale.loss.objective import Objective
    from mmscale.model.build import build_model
    from mmscale.training.part import Step
    from mmscale.training.step import Learner, train_step

    tower = {"name": "openclip:ViT-B-32", "weights": "random"}
    config = validate(
        {
            "data": {"train": "none"},
            "model": {
                "vision": {**tower, "options": VISION},
                "text": {**tower, "options": TEXT},
                "embed_dim": EMBED,
            },
            "train": {
                "global_batch_size": rows * world.size, "micro_batch_size": rows // chunks,
            },
            "optim": OPTIM,
            "engine": {"device": "cpu", "precision": "fp32", "deepspeed": deepspeed},
        }
    )  # fmt: skip
    model, _ = build_model(config.model, None, 0)
    # ZeRO-3 leaves nothing of them in the model.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan, policy = plan_batch(config, world.size), choose(config.engine)
    kind = "accelerate" if deepspeed is None else "deepspeed"
    engine = build_engine(kind, model.train(), config, plan, policy, world)
    peers = connect(world)
    objective = Objective(config, peers)
    pixels, ids = make_rows(rows, tokens, world.rank)
    batch = batch_of(pixels, ids, tokens, peers.first_row(rows))
    learner = Learner(engine, objective, peers, rows // chunks)

    def run(steps: int) -> None:
        for step in range(steps):
            train_step(learner, batch, Step(RunState(step), RATE))

    return run, parameters


def peer(world: World, rows: int, tokens: int, chunks: int) -> tuple[Run, int]:
    """`train_one_epoch` of open_clip_train, set up as its `main` does."""
    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model: Any = open_clip.CLIP(EMBED, VISION, TEXT, output_dict=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = peer_optimizer(model)
    several = world.size > 1
    wrapped = DistributedDataParallel(model) if several else model
    loss = ClipLoss(
        local_loss=several,
        gather_with_grad=several,
        cache_labels=True,
        rank=world.rank,
        world_size=world.size,
    )
    arguments = peer_arguments(world, rows, chunks, "cpu", "fp32")
    batches = list(
        zip(*(x.chunk(chunks) for x in make_rows(rows, tokens, world.rank)), strict=True)
    )

    def run(steps: int) -> None:
        data = {"train": Loaded(batches * steps, rows * steps * world.size)}
        train_one_epoch(wrapped, data, loss, 0, optimizer, None, None, None, arguments)

    return run, parameters


def peer_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the groups that open_clip's `main` makes."""
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
    decayed = [p for _, p in named if all(p is not other for other in plain)]
    return torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}],
        lr=RATE,
        betas=BETAS,
        eps=EPS,
    )


def peer_arguments(world: World, rows: int, chunks: int, device: str, precision: str) -> Namespace:
    """What `train_one_epoch` reads of the command line of open_clip's `main`."""
    return Namespace(
        device=device, precision=precision, distill=False, accum_freq=chunks, skip_scheduler=True,
        horovod=False, grad_clip_norm=CLIP_NORM, log_every_n_steps=10**9, rank=world.rank,
        local_rank=world.local_rank, world_size=world.size, batch_size=rows // chunks,
        wandb=False, log_local=False,
    )  # fmt: skip


class Loaded:
    """Batches in memory, as open_clip_train takes its data."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], samples: int):
        self.dataloader = self
        self.num_batches, self.num_samples = len(batches), samples
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Nothing is shuffled."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


SIDES = {"ours": ours, "peer": peer}

if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
