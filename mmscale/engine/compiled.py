"""Transformer blocks compiled one by one, and what keeps their shapes few.

The compiled forward takes the place of a block's own: names in checkpoints, hooks around the block
and the copy that becomes the momentum encoder stay as they are. Each shape is compiled once, with a
graph and without, and serves every block of a class; so a stage's rows are chunks of one size, and
its captions are padded to a few lengths.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmscale.errors import ConfigError
from mmscale.model.blocks import blocks
from mmscale.parallel.device import DevicePolicy

# Captions of a compiled run, or of one on a card, have one of so many lengths.
MOST_LENGTHS = 5
# Widths of attention's tiles.
_MULTIPLE = 8
# A run of fewer updates is over before compiling pays.
SHORTEST_RUN = 1000
# Shapes of one class of blocks: lengths of both towers, with and without a graph, in both modes.
_MOST_SHAPES = 64


def is_compiled(choice: str, policy: DevicePolicy, updates: int) -> bool:
    """Whether blocks are compiled.

    Args:
        choice: `engine.compile`.
        policy: Of the run.
        updates: Of the run.
    """
    return choice == "blocks" or (
        choice == "auto" and policy.runs_ahead and updates >= SHORTEST_RUN
    )


def compile_blocks(towers: list[nn.Module]) -> int:
    """Compile the blocks of these towers when they are first called; returns how many.

    Raises:
        ConfigError: None of them has any.
    """
    found = [block for tower in towers for block in blocks(tower)]
    if not found:
        raise ConfigError(
            "engine.compile=blocks, but neither tower is made of transformer blocks; set "
            "engine.compile=off"
        )
    from torch import _dynamo

    limits: Any = _dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_SHAPES)
    for block in found:
        # An attribute of the module, not `compile()`: hooks of engines stay outside of the graph.
        block.forward = torch.compile(block.forward, dynamic=False)
    return len(found)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and not compiled for batches of whatever size these are."""
    module.eval()
    try:
        if "torch._dynamo" not in sys.modules:
            yield
        else:
            with torch.compiler.set_stance("force_eager"):
                yield
    finally:
        module.train()


def caption_lengths(context_length: int) -> tuple[int, ...]:
    """The lengths that captions are padded to, the longest last."""
    step = math.ceil(context_length / MOST_LENGTHS / _MULTIPLE) * _MULTIPLE
    return (*range(step, context_length, step), context_length)
