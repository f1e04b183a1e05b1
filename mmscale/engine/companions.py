"""What an update uses beside the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mmscale.contracts import Bank, NamedTensor
from mmscale.engine.bank import RowBank
from mmscale.engine.clusters import EpochClusters
from mmscale.engine.matching import Matcher
from mmscale.engine.momentum import MomentumEncoder


@dataclass(frozen=True)
class Companions:
    """Each is None where no setting asks for it.

    Attributes:
        momentum: The running mean of the weights.
        momentum_rows: The objective wants the batch through the running mean as well.
        matcher: Pairs for the fusion model.
        bank: Rows of earlier batches.
        bank_momentum: The bank keeps rows of the running mean.
        bank_share: Share of the bank's slots that losses look at, by the updates taken.
        clusters: Clusters of the training images.
    """

    momentum: MomentumEncoder | None = None
    momentum_rows: bool = False
    matcher: Matcher | None = None
    bank: RowBank | None = None
    bank_momentum: bool = False
    bank_share: Callable[[int], float] | None = None
    clusters: EpochClusters | None = None

    def remembered(self, step: int) -> Bank | None:
        """Rows of earlier batches for the update after `step`; None where it looks at none."""
        if self.bank is None:
            return None
        share = 1.0 if self.bank_share is None else self.bank_share(step)
        length = round(share * len(self.bank))
        return self.bank.latest(length) if length else None

    def tensors(self) -> Iterator[NamedTensor]:
        """What a checkpoint keeps of them. Collective."""
        if self.momentum:
            yield from self.momentum.tensors()
        if self.bank:
            yield from self.bank.named()
        if self.clusters:
            yield from self.clusters.named()

    def close(self) -> None:
        """Free what the momentum encoder holds."""
        if self.momentum:
            self.momentum.close()
