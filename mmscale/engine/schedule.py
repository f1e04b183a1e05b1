"""The course of the learning rate."""

import math


def rate_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor of the base rate for update `step` (from 0) of `total`.

    Args:
        step: Updates already made.
        total: Updates of the whole run, or of its stage.
        warmup: Updates over which the rate rises linearly; cut to `total`.
        kind: `cosine`, `linear`, `constant` or `plateau` after the warm-up; a plateau's falls are a
            factor of their own.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return max(0.0, 1 - progress) if kind == "linear" else 1.0
