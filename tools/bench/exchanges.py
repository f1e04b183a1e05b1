"""Collectives of one update: how many, of how many bytes, and how much while the backward runs.

torchrun --nproc_per_node 2 -m tools.bench.exchanges CHUNKS [FILE]

FILE is a DeepSpeed file; without one the ranks run on FSDP2. Counted is what rank 0 hands to
torch.distributed in its third update, the loss's own exchanges among it. What is handed over while
the backward runs can be hidden by it; the rest is waited for. Prints a row of a table, and by the
profiler's timeline how much of the time of a fourth update's collectives lies under a product.
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from mmscale.contracts import World
from mmscale.parallel.world import join_ranks, leave, promised_world
from tools.bench.step_sides import ours

ROWS, TOKENS = 12, 20
# Position and keyword of the whole payload.
PAYLOADS = {
    "all_gather_into_tensor": ("all-gather", 0, "output_tensor"),
    "all_gather_single": ("all-gather", 0, "output_tensor"),
    "all_gather": ("all-gather", 0, "tensor_list"),
    "reduce_scatter_tensor": ("reduce-scatter", 1, "input"),
    "reduce_scatter_single": ("reduce-scatter", 1, "input"),
    "all_reduce": ("all-reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution_backward"}
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "broadcast": 1}


def main(chunks: int, deepspeed: str | None) -> None:
    """Count the third update."""
    heard: Counter[tuple[str, str]] = Counter()
    # Before DeepSpeed is imported, which keeps the functions that it finds.
    for name in PAYLOADS:
        if hasattr(dist, name):
            setattr(dist, name, _listener(heard, name, getattr(dist, name)))
    world: World = promised_world()
    join_ranks(world, "gloo", 300)
    extra: Any = () if deepspeed is None else (deepspeed,)
    run, parameters = ours(world, ROWS, TOKENS, chunks, *extra)
    run(2)
    heard.clear()
    run(1)
    if world.is_main:
        print(_row(heard, chunks, deepspeed or "without DeepSpeed", parameters))
    with profile(activities=[ProfilerActivity.CPU]) as timeline:
        run(1)
    if world.is_main:
        print(_hidden(timeline.events()))
    leave()


def _listener(
    heard: Counter[tuple[str, str]], name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    kind, place, word = PAYLOADS[name]

    def call(*args: Any, **words: Any) -> Any:
        payload = args[place] if len(args) > place else words[word]
        tensors = payload if isinstance(payload, list) else [payload]
        size = sum(tensor.nbytes for tensor in tensors)
        heard[kind, "calls"] += 1
        heard[kind, "bytes"] += size
        if torch._C._current_graph_task_id() != -1:
            heard[kind, "under backward"] += size
        return function(*args, **words)

    return call


def _row(heard: Counter[tuple[str, str]], chunks: int, name: str, parameters: int) -> str:
    sent = {what: _sent(heard, what) for what in ("bytes", "under backward")}
    calls = " + ".join(f"{heard[kind, 'calls']} {kind}" for kind in PASSES if heard[kind, "calls"])
    return (
        f"| {name} | {chunks} | {calls} | {sent['bytes'] / 4 / parameters:.2f} "
        f"| {sent['under backward'] / sent['bytes']:.0%} |"
    )


def _hidden(events: Any) -> str:
    """How long collectives took, and how much of it a product was computed meanwhile."""
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    products = sorted((start, end) for name, start, end in spans if name in PRODUCTS)
    exchanged = hidden = 0.0
    for name, start, end in spans:
        if not name.startswith("gloo:"):
            continue
        exchanged += end - start
        for left, right in products:
            # Microseconds; products of one thread do not overlap.
            hidden += max(0.0, min(right, end) - max(left, start))
    return (
        f"{exchanged / 1e3:.0f} ms in collectives, {hidden / exchanged:.0%} of it under a product"
    )


def _sent(heard: Counter[tuple[str, str]], what: str) -> int:
    """Bytes that a ring of two ranks sends from each."""
    return sum(passes * heard[kind, what] // 2 for kind, passes in PASSES.items())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
