"""What contrastive losses share: a rank's rows against the columns of all ranks and of the bank.

Identity decides what is what: columns of a row's own id are its positives, a remembered row of that
id is left out, and every other one is a negative.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmscale.config.loss import Precision
from mmscale.contracts import Bank, Peers
from mmscale.loss.product import similarity


@dataclass(frozen=True)
class PairRows:
    """A rank's pairs, and what they are contrasted with.

    Attributes:
        image: Unit rows of the images.
        text: Unit rows of the captions; row i belongs to image i.
        ids: Identity of each row.
        peers: The ranks that contrast together.
        bank: Further negatives; those of a row's own id are left out.
        precision: Of the products of rows and columns.
    """

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    ids: Int64[Tensor, " b"]
    peers: Peers
    bank: Bank | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Contrast:
    """Rows of one direction with all that they are contrasted with.

    Attributes:
        similarity: Cosines, fp32 or wider.
        positive: Columns of the row's own id among those that may be positives.
        negative: Columns of other ids, remembered ones included.
        pair: Cosine of each row with its own partner.
        discount: Logarithm of what each column counts, where not all of them count 1 (`mining.py`).
    """

    similarity: Float[Tensor, "r m"]
    positive: Bool[Tensor, "r m"]
    negative: Bool[Tensor, "r m"]
    pair: Float[Tensor, " r"]
    discount: Float[Tensor, "r m"] | None = None


@dataclass(frozen=True)
class Direction:
    """What rows are contrasted with: captions for images, images for captions.

    A loss contrasts some rows at a time (`strips.py`), so that no tensor has a number for each row
    and each column.

    Attributes:
        rows: Of this rank, fp32 or wider.
        columns: Of all ranks, then the remembered ones.
        ids: Identity of each row.
        column_ids: Identity of each column; -1 where an empty slot is.
        partner: Column of each row's own partner.
        first_negative: From this column on none is a positive; None: each may be.
        itself: Column that is the row itself, neither positive nor negative; None without one.
        precision: Of the products of rows and columns.
    """

    rows: Float[Tensor, "b d"]
    columns: Float[Tensor, "m d"]
    ids: Int64[Tensor, " b"]
    column_ids: Int64[Tensor, " m"]
    partner: Int64[Tensor, " b"]
    first_negative: int | None = None
    itself: Int64[Tensor, " b"] | None = None
    precision: Precision = "fp32"

    def part(self, rows: slice) -> "Direction":
        """The same direction for some of its rows."""
        itself = None if self.itself is None else self.itself[rows]
        return replace(
            self,
            rows=self.rows[rows],
            ids=self.ids[rows],
            partner=self.partner[rows],
            itself=itself,
        )

    def contrast(self) -> Contrast:
        """All rows against all columns: b x m numbers, several times."""
        cosines = similarity(self.rows, self.columns, self.precision)
        positive = self.ids[:, None] == self.column_ids
        # Identities are never negative.
        negative = ~positive & (self.column_ids >= 0)
        if self.first_negative is not None:
            places = torch.arange(len(self.columns), device=positive.device)
            positive = positive & (places < self.first_negative)
        if self.itself is not None:
            positive = positive.scatter(1, self.itself[:, None], False)
        pair = cosines.gather(1, self.partner[:, None])[:, 0]
        return Contrast(cosines, positive, negative, pair)


def directions(pairs: PairRows) -> tuple[Direction, Direction]:
    """Images against captions, and captions against images."""
    image, text, ids, peers, bank = pairs.image, pairs.text, pairs.ids, pairs.peers, pairs.bank
    remembered = (None, None) if bank is None else (bank.text, bank.image)
    slots = None if bank is None else bank.ids
    ways = (
        direction(image, text, ids, peers, remembered[0], slots),
        direction(text, image, ids, peers, remembered[1], slots),
    )
    return replace(ways[0], precision=pairs.precision), replace(ways[1], precision=pairs.precision)


def direction(
    rows: Float[Tensor, "b d"],
    partners: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    peers: Peers,
    remembered: Float[Tensor, "k d"] | None = None,
    slots: Int64[Tensor, " k"] | None = None,
) -> Direction:
    """This rank's rows against every rank's partners and the remembered ones. Collective.

    Args:
        rows: Unit rows.
        partners: Unit rows of the other modality; row i belongs to row i.
        ids: Identity of each row.
        peers: The ranks that contrast together.
        remembered: Further columns, without a gradient.
        slots: Identity of each remembered column; -1 where there is none yet.
    """
    rows, columns, column_ids = wide(rows), peers.columns(wide(partners)), peers.columns(ids)
    own = torch.arange(len(rows), device=rows.device) + peers.first_row(len(rows))
    if remembered is None or slots is None:
        return Direction(rows, columns, ids, column_ids, own)
    first_negative = len(columns)
    columns = torch.cat([columns, remembered.to(columns.dtype)])
    column_ids = torch.cat([column_ids, slots])
    return Direction(rows, columns, ids, column_ids, own, first_negative)


def two_views(pairs: PairRows) -> Direction:
    """Both modalities as views of one thing: each row against all rows of both but itself."""
    image, text, ids, peers = pairs.image, pairs.text, pairs.ids, pairs.peers
    rows = torch.cat([wide(image), wide(text)])
    columns = torch.cat([peers.columns(wide(image)), peers.columns(wide(text))])
    num_rows, half = len(ids), len(columns) // 2
    own = torch.arange(num_rows, device=rows.device) + peers.first_row(num_rows)
    return Direction(
        rows,
        columns,
        torch.cat([ids, ids]),
        peers.columns(ids).repeat(2),
        partner=torch.cat([own + half, own]),
        itself=torch.cat([own, own + half]),
        precision=pairs.precision,
    )


def wide(values: Tensor) -> Tensor:
    """In fp32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def discounted(logits: Float[Tensor, "b m"], way: Contrast) -> Float[Tensor, "b m"]:
    """Logits whose exponentials count what their columns do."""
    return logits if way.discount is None else logits + way.discount


def mean_where(values: Float[Tensor, "b m"], keep: Bool[Tensor, "b m"]) -> Float[Tensor, " b"]:
    """Each row's mean over the columns kept; 0 where there are none."""
    return values.where(keep, values.new_zeros(())).sum(1) / keep.sum(1).clamp(min=1)


def mean_of_all(logits: Float[Tensor, "b m"], way: Contrast) -> Float[Tensor, " b"]:
    """Each row's mean over positives and negatives, each by what it counts."""
    everything = way.positive | way.negative
    if way.discount is None:
        return mean_where(logits, everything)
    weight = way.discount.exp() * everything
    return (logits * weight).sum(1) / weight.sum(1)


def logsumexp_where(values: Float[Tensor, "b m"], keep: Bool[Tensor, "b m"]) -> Float[Tensor, " b"]:
    """Each row's log-sum-exp over the columns kept; -inf, without a gradient, where there are none.

    Autograd through a row of -inf would be NaN.
    """
    low = values.new_full((), -torch.inf)
    top = values.detach().where(keep, low).amax(1)
    any_kept = keep.any(1)
    top = top.where(any_kept, torch.zeros_like(top))
    total = (values - top[:, None]).where(keep, low).exp().sum(1)
    return (total.where(any_kept, torch.ones_like(total)).log() + top).where(any_kept, low)
