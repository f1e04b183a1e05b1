"""The contrastive loss of a sample at its logit scale, between its floor and its chance value."""

import math

from jaxtyping import Float64
from torch import Tensor


def contrast_figures(similarity: Float64[Tensor, "n n"], scale: float) -> dict[str, float]:
    """What InfoNCE says of these pairs.

    Args:
        similarity: Cosines; row i and column i belong together.
        scale: 1 / temperature.

    Returns:
        `logit_scale`; `loss`, nats; `loss_chance`: ln n; `loss_floor`: the least that unit vectors
        reach at this scale; `loss_progress`: 0 at chance, 1 at the floor, negative above chance.

    Source: the floor is that of n pairs on a regular simplex (Lu and Steinerberger 2022, "Neural
        collapse under cross-entropy loss", theorem 1).
    """
    num = len(similarity)
    logits = scale * similarity
    matched = float(logits.diagonal().mean())
    rows, columns = (float(logits.logsumexp(dim).mean()) for dim in (1, 0))
    loss, chance, floor = (rows + columns) / 2 - matched, math.log(num), loss_floor(num, scale)
    return {
        "logit_scale": scale,
        "loss": loss,
        "loss_chance": chance,
        "loss_floor": floor,
        "loss_progress": (chance - loss) / (chance - floor),
    }


def loss_floor(num: int, scale: float) -> float:
    """ln(1 + (n - 1) exp(-s n / (n - 1))): matched cosines 1, all others -1 / (n - 1)."""
    return math.log1p((num - 1) * math.exp(-scale * num / (num - 1)))
