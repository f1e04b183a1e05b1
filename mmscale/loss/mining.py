"""Hard negatives: of all that a row is contrasted with, the most similar ones count in full.

Each row ranks the columns of all ranks and of the queue, so what is mined does not depend on how
the batch is cut. Columns of a row's own id are never among them. Ranking needs all logits
of a row together: mined losses go by strips of rows (`strips.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config.training import MiningConfig
from mmscale.config.values import Ramp
from mmscale.loss.contrast import Contrast


@dataclass(frozen=True)
class Mining:
    """What is mined now.

    Attributes:
        kind: `hard`: the most similar negatives; `semi_hard`: the most similar of those that are
            less similar than the row's own pair.
        share: Of a row's candidates; rounded up.
        strength: 0: every negative counts alike; 1: only those that are mined.

    Source: semi-hard: Schroff et al. 2015, "FaceNet" (arXiv 1503.03832), section 3.2.
    """

    kind: Literal["hard", "semi_hard"]
    share: float
    strength: float

    @classmethod
    def of(cls, settings: MiningConfig, at: Callable[[Ramp], float]) -> "Mining | None":
        """As configured; None where every negative counts alike.

        Args:
            settings: `negatives.mining`.
            at: A ramp's value now.
        """
        strength = at(settings.strength)
        if settings.kind == "none" or strength == 0:
            return None
        return cls(settings.kind, settings.share, strength)

    def __call__(self, way: Contrast) -> Contrast:
        """The same contrast, in which negatives that are not mined count 1 - strength.

        Negatives as similar as the last one mined are mined as well.
        """
        similarity = way.similarity.detach()
        candidates = way.negative
        if self.kind == "semi_hard":
            candidates = candidates & (similarity < way.pair.detach()[:, None])
        low = similarity.new_full((), -torch.inf)
        ranked = similarity.where(candidates, low).sort(1, descending=True).values
        count = self.counted(candidates.sum(1).double()).long()
        last = ranked.gather(1, (count - 1).clamp(min=0)[:, None])
        mined = candidates & (similarity >= last)
        if self.strength == 1:
            return replace(way, negative=mined)
        easy = way.negative & ~mined
        discount = torch.zeros_like(similarity).masked_fill(easy, math.log(1 - self.strength))
        return replace(way, discount=discount)

    def counted(self, candidates: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """How many of so many candidates are mined, where no two are equally similar."""
        # 0.1 of 30 is 3, whatever the product of floats is.
        return (candidates * self.share - 1e-9).ceil()

    def effective(self, negatives: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """What so many negatives, all of them candidates, count together."""
        mined = self.counted(negatives)
        return mined + (1 - self.strength) * (negatives - mined)
