"""One side of `bench loss` in a process of its own: prints its seconds and bytes as JSON.

Started as `python -m tools.bench.loss_sides SIDE ROWS WIDTH DEVICE SECONDS`, alone or by
torchrun on several ranks.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmscale.config.schema import EngineConfig
from mmscale.contracts import World
from mmscale.loss.contrast import PairRows
from mmscale.loss.infonce import infonce
from mmscale.parallel.device import choose
from mmscale.parallel.peers import barrier, connect, gather_objects
from mmscale.parallel.world import join_ranks, leave, promised_world

# Loads code and starts threads before anything is measured.
WARM_ROWS = 64
STRIP_ROWS = 1024

Rows = tuple[Tensor, Tensor, Tensor]


def main(side: str, rows: int, width: int, device: str, seconds: float) -> None:
    """Measure forward and backward over `rows` rows a rank."""
    world = promised_world()
    policy = choose(EngineConfig.model_validate({"device": device}), world.local_rank)
    join_ranks(world, policy.backend, 120)
    call, place = SIDES[side](world), policy.device
    call(make(WARM_ROWS, width, place, world))
    inputs = make(rows, width, place, world)
    barrier()
    peak = Peak(place)
    times = [timed(call, inputs, place)]
    memory = peak.bytes()
    for _ in range(repeats(times[0], seconds, world)):
        barrier()
        times.append(timed(call, inputs, place))
    # The slowest rank is what a step waits for.
    slowest = [max(turn) for turn in zip(*gather_objects(world, times), strict=True)]
    largest = max(gather_objects(world, memory))
    if world.is_main:
        print(json.dumps({"time_s": statistics.median(slowest), "memory_bytes": largest}))
    leave()


def make(rows: int, width: int, device: torch.device, world: World) -> Rows:
    """Unit rows of both modalities, and CLIP's scale at the start of training."""
    generator = torch.Generator().manual_seed(world.rank)
    image, text = (
        normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2)
    )
    scale = torch.tensor([1 / 0.07])
    return tuple(t.to(device).requires_grad_() for t in (image, text, scale))  # type: ignore[return-value]


def timed(call: Callable[[Rows], None], inputs: Rows, device: torch.device) -> float:
    """Seconds of one forward and backward that leaves fresh gradients."""
    for tensor in inputs:
        tensor.grad = None
    wait(device)
    start = time.perf_counter()
    call(inputs)
    wait(device)
    return time.perf_counter() - start


def repeats(first: float, seconds: float, world: World) -> int:
    """Further turns that fit into `seconds`, the same on every rank."""
    return min(gather_objects(world, int(min(seconds / first, 50))))


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


class Peak:
    """Most memory that was held since the start, beyond what was held at the start."""

    def __init__(self, device: torch.device):
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            # Linux: sets the high-water mark back to what is resident now.
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.accelerator.reset_peak_memory_stats()
        self._start = self._high()

    def bytes(self) -> int:
        return self._high() - self._start

    def _high(self) -> int:
        if not self._on_cpu:
            return torch.accelerator.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def ours(world: World) -> Callable[[Rows], None]:
    """Our loss, every row with an id of its own."""
    peers = connect(world)

    def call(rows: Rows) -> None:
        image, text, scale = rows
        ids = torch.arange(len(image), device=image.device) + peers.first_row(len(image))
        infonce(PairRows(image, text, ids, peers), scale).backward()

    return call


def peer(world: World) -> Callable[[Rows], None]:
    """open_clip's loss, as its trainer is told to compute it on several ranks."""
    from open_clip.loss import ClipLoss

    several = world.size > 1
    loss = ClipLoss(
        local_loss=several, gather_with_grad=several, rank=world.rank, world_size=world.size
    )

    def call(rows: Rows) -> None:
        image, text, scale = rows
        loss(image, text, scale[0]).backward()

    return call


def limit(world: World) -> Callable[[Rows], None]:
    """The least work: four products of this rank's rows and all columns, in strips."""

    def call(rows: Rows) -> None:
        image, text = rows[0].detach(), rows[1].detach().repeat(world.size, 1)
        height = min(STRIP_ROWS, len(image))
        strip = image.new_empty(height, len(text))
        image_grad, text_grad = torch.empty_like(image), torch.zeros_like(text)
        for top in range(0, len(image), height):
            part = image[top : top + height]
            logits = strip[: len(part)]
            torch.mm(part, text.T, out=logits)
            torch.mm(part, text.T, out=logits)
            torch.mm(logits, text, out=image_grad[top : top + height])
            text_grad.addmm_(logits.T, part)

    return call


SIDES = {"ours": ours, "peer": peer, "limit": limit}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
