"""Which pairs of a set do not belong together, and how many.

A mispaired image and caption fit like a random pairing, and how those fit is known. Three of
ten random pairings stand below their median by more than half a deviation; of matched pairs hardly
any do. So the lower tail counts the mispaired ones, a little too many of them if
anything.

Source: Storey 2002 ("A direct approach to false discovery rates", J. R. Stat. Soc. B 64): the share
    of a known law from the tail where the other law is rare, and the rate of false finds in a list.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from mmscale.diagnostics.dataset.fit import Fit
from mmscale.diagnostics.dataset.verdict import MOST_EXAMPLES, DataVerdict, Looks
from mmscale.diagnostics.mixture import share_figures

# The tail below this deviate is counted.
_TAIL = -0.5
# Matched pairs in that tail look like a share of this many mispaired ones: images whose captions
# are right but say little. Of 50 clean draws of 1,440 photographs the lower end was above 0.003
# in three, at 0.0034; of 5,400 pairs with one in a hundred mispaired it is 0.0066 and more.
TOLERATED = 0.005
# Of a Poisson law: one in 200 counts lies below.
_QUANTILE = 2.576
PRECISION = 0.8


@dataclass(frozen=True)
class Mispaired:
    """What is known of a set's mispaired share.

    Attributes:
        holds: More pairs stand like random pairings than matched pairs do.
        share: The likeliest share.
        low: Where its interval begins.
        high: Where its interval ends.
        rows: Pairs in the order in which they are to be looked at, the least likely first.
        precision: For each of `rows`, the share of mispaired ones up to it that is expected.
    """

    holds: bool
    share: float
    low: float
    high: float
    rows: Int64[Tensor, " n"]
    precision: Float64[Tensor, " n"]

    def sure(self, precision: float = PRECISION) -> Int64[Tensor, " found"]:
        """The longest list of pairs of which so many are expected to be mispaired."""
        if not self.holds:
            return self.rows[:0]
        enough = (self.precision >= precision).nonzero()[:, 0]
        return self.rows[: int(enough[-1]) + 1 if len(enough) else 0]


def mispaired(fit: Fit) -> Mispaired:
    """The share with an interval, and the list."""
    tail = int((fit.deviates < _TAIL).sum())
    expected = len(fit.deviates) * float(torch.special.ndtr(torch.tensor(_TAIL).double()))
    least = _fewest(tail) / expected
    figures = share_figures(fit.deviates)
    low = max(1 - figures["matched_share_high"], least - TOLERATED, 0.0)
    high = max(1 - figures["matched_share_low"], low)
    # The tail counts some matched pairs too, the mixture may count a few mispaired ones as matched.
    share = min(max((tail / expected + 1 - figures["matched_share"]) / 2, low), high)
    # The whole list sorted by the odds: deviates of the least ones may tie.
    rows = fit.own.argsort()
    below = torch.special.ndtr(fit.deviates[rows]) * len(rows)
    counted = torch.arange(1, len(rows) + 1, dtype=torch.float64)
    precision = (share * below / counted).clamp(max=1.0)
    return Mispaired(least > TOLERATED, share, low, high, rows, precision)


def _fewest(count: int) -> float:
    """The lower end of a Poisson law's mean, by Wilson and Hilferty's cube root."""
    if count == 0:
        return 0.0
    return count * max(0.0, 1 - 1 / (9 * count) - _QUANTILE / (3 * math.sqrt(count))) ** 3


def mispaired_pairs(looks: Looks, fit: Fit) -> DataVerdict | None:
    """The verdict on a set.

    Args:
        looks: The images that were compared with their captions, row by row.
        fit: Of the same rows.
    """
    found = mispaired(fit)
    if not found.holds:
        return None
    sure = found.sure()
    listed = found.rows[: max(1, len(sure))].tolist()
    return DataVerdict(
        "mispaired",
        found.share,
        (found.low, found.high),
        len(looks),
        f"about {found.share:.1%} of {len(looks):,} images have captions that fit no better than "
        f"those of other images; {len(sure):,} are named, of which {PRECISION:.0%} are expected to "
        "be wrong",
        "pair the listed images anew, or leave them out (data.mask)",
        tuple(
            looks.example(
                row,
                f"{_first(looks.captions[row])} (better than {_chance(fit, row):.0%} of random "
                "pairings)",
            )
            for row in listed[:MOST_EXAMPLES]
        ),
        {f"weight_{name.replace(' ', '_')}": weight for name, weight in fit.weights.items()},
        leave_out=looks.ids_of(sure.tolist()),
    )


def _first(captions: tuple[str, ...]) -> str:
    return captions[0][:300] if captions else ""


def _chance(fit: Fit, row: int) -> float:
    return float(torch.special.ndtr(fit.deviates[row]))
