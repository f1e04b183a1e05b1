"""How far one update moves the weights, and which of them it leaves where they were."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from mmscale.contracts import COMPONENTS, Peers
from mmscale.engine.protocol import Engine
from mmscale.model.two_tower import component_of

# Decay alone, computed in fp32, comes this near to what it should be; a gradient's step does not.
_ROUNDING = 3e-7


@dataclass(frozen=True)
class Moved:
    """What an update did to the weights.

    Attributes:
        shares: By component, the length of the update as a share of the weights' length.
        lengths: By component, the weights' length.
        still: Parameters that no gradient moved: they are what they were, or decay alone made them
            smaller.
    """

    shares: dict[str, float]
    lengths: dict[str, float]
    still: frozenset[str]


class Movement:
    """Taken before an update, asked after it; holds a copy of this rank's share of the weights.

    Args:
        engine: Between two updates.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._before = {name: weights.clone() for name, weights in engine.masters()}

    def since(self, names: list[str], peers: Peers) -> Moved:
        """What the update did. Collective.

        Args:
            names: Every trained parameter, in an order equal on all ranks.
            peers: All ranks.
        """
        places = {name: place for place, name in enumerate(names)}
        squares = torch.zeros(len(names), 3, dtype=torch.float64)
        shrinks = _shrinks(self._engine.groups)
        for name, weights in self._engine.masters():
            squares[places[name]] = _squares(self._before[name], weights, shrinks[name])
        moved, pulled, size = peers.total(squares).T
        still = pulled <= _ROUNDING**2 * size
        shares, lengths = {}, {}
        for component in COMPONENTS:
            mine = torch.tensor([component_of(name) == component for name in names])
            if float(size[mine].sum()) > 0:
                lengths[component] = float(size[mine].sum().sqrt())
                shares[component] = float(moved[mine].sum().sqrt()) / lengths[component]
        held = (name for name, is_still in zip(names, still.tolist(), strict=True) if is_still)
        return Moved(shares, lengths, frozenset(held))


def trained_names(engine: Engine) -> list[str]:
    """Trained parameters by name, in an order equal on all ranks."""
    return [name for name, p in engine.module.named_parameters() if p.requires_grad]


def _squares(before: Tensor, after: Tensor, shrink: float) -> Float64[Tensor, "3"]:
    """Squared lengths: of the whole step, of the step without decay, of the weights."""
    step = after - before
    parts = (step, step.add(before, alpha=shrink), before)
    return torch.stack([part.double().square().sum() for part in parts]).cpu()


def _shrinks(groups: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Rate times decay of each parameter: the share of it that decay took away."""
    return {
        name: group["lr"] * group["weight_decay"] for group in groups for name in group["names"]
    }
