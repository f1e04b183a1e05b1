"""What an update uses beside the model."""

from dataclasses import dataclass

from mmscale.engine.bank import RowBank
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
    """

    momentum: MomentumEncoder | None = None
    momentum_rows: bool = False
    matcher: Matcher | None = None
    bank: RowBank | None = None
    bank_momentum: bool = False
