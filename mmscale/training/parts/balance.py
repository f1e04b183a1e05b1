"""Keeps the towers' relative updates in proportion by slowing the faster one down.

OGM-GE, the known method, weighs gradients by how well each modality alone predicts the class. Two
towers under one contrastive loss have no score of their own: each one's loss is the other's too.
What can be told apart is how far an update moves each tower as a share of its weights' length, and
the lever on it is the tower's rate. Gradient norms would not do: Adam divides them out.

Source: Peng et al. 2022, "Balanced Multimodal Learning via On-the-fly Gradient Modulation"
(arXiv 2203.15332), for OGM-GE.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from mmscale.checkpoint.state import RunState
from mmscale.config.training import BalanceConfig
from mmscale.contracts import Batch, LossInput, Peers
from mmscale.engine.movement import Movement, trained_names
from mmscale.engine.protocol import Engine
from mmscale.training.part import Part, Step

# Share of the distance to the band that one measurement makes good.
GAIN = 0.5
# Weight of the measurements before in the mean of the logarithms.
MEMORY = 0.8
# A tower is never slowed down by more.
MOST = 100.0
FIGURES = ("balance", "update_vision", "update_text")


class ModalityBalancer(Part):
    """Measures every so many updates, and holds a factor of at most 1 for each tower's rate.

    Its state is numbers by name, equal on every rank: `balance` is the logarithm of the image
    tower's factor over the text tower's (one of the two is 1), `balance_mean` the mean of the
    ratio's logarithm, `update_vision` and `update_text` the newest relative updates.
    """

    name = "balance"
    follows_on_device = True

    def __init__(self, config: BalanceConfig, engine: Engine, peers: Peers):
        """Begin without a tilt.

        Args:
            config: `optim.balance`.
            engine: Its groups' `balance` is set.
            peers: All ranks.
        """
        self._config, self._engine, self._peers = config, engine, peers
        self._state: dict[str, float] = {}
        self._movement: Movement | None = None
        self._set_factors()

    def before(self, step: Step, batch: Batch) -> None:
        self._movement = Movement(self._engine) if self._measures(step.number) else None

    def waits(self, state: RunState) -> bool:
        return self._measures(state.step - state.stage_start)

    def follow(self, rows: LossInput, batch: Batch, applied: Tensor | None = None) -> None:
        movement, self._movement = self._movement, None
        if movement is None:
            return
        # A skipped update has moved nothing.
        shares = movement.since(trained_names(self._engine), self._peers).shares
        if shares.get("vision") and shares.get("text"):
            self._adjust(shares["vision"], shares["text"])
            self._set_factors()

    def figures(self) -> dict[str, float]:
        return {name: self._state[name] for name in FIGURES if name in self._state}

    def state(self) -> dict[str, float]:
        return dict(self._state)

    def load(self, state: Mapping[str, float]) -> None:
        self._state = dict(state)
        self._set_factors()

    def _measures(self, number: int) -> bool:
        return self._config.band is not None and number % self._config.every == 0

    def _adjust(self, vision: float, text: float) -> None:
        assert self._config.band is not None, "only a band is measured for"
        low, high = (math.log(end) for end in self._config.band)
        latest = math.log(vision / text)
        mean = MEMORY * self._state.get("balance_mean", latest) + (1 - MEMORY) * latest
        beyond = max(0.0, mean - high) - max(0.0, low - mean)
        before = self._state.get("balance", 0.0)
        limit = math.log(MOST)
        now = min(limit, max(-limit, before - GAIN * beyond))
        self._state = {
            "balance": now,
            # The ratio follows the rates at once, so the mean need not wait for it.
            "balance_mean": mean + now - before,
            "update_vision": vision,
            "update_text": text,
        }

    def _set_factors(self) -> None:
        tilt = self._state.get("balance", 0.0)
        factors = {"vision": math.exp(min(0.0, tilt)), "text": math.exp(min(0.0, -tilt))}
        for group in self._engine.groups:
            group["balance"] = factors.get(group["component"], 1.0)
