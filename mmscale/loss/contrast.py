"""What contrastive losses share: a rank's rows against the columns of all ranks and of the bank.

Identity decides what is what: columns of a row's own id are its positives, a remembered row of that
id is left out, and every other one is a negative.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmscale.contracts import Bank, Peers


@dataclass(frozen=True)
class PairRows:
    """A rank's pairs, and what they are contrasted with.

    Attributes:
        image: Unit rows of the images.
        text: Unit rows of the captions; row i belongs to image i.
        ids: Identity of each row.
        peers: The ranks that contrast together.
        bank: Further negatives; those of a row's own id are left out.
    """

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    ids: Int64[Tensor, " b"]
    peers: Peers
    bank: Bank | None = None


@dataclass(frozen=True)
class Contrast:
    """One direction: images against captions, or captions against images.

    Attributes:
        similarity: Cosines, fp32 or wider.
        positive: Columns of the row's own id among the batch's.
        negative: Columns of other ids, remembered ones included.
        pair: Cosine of each row with its own partner.
        discount: Logarithm of what each column counts, where not all of them count 1 (`mining.py`).
    """

    similarity: Float[Tensor, "b m"]
    positive: Bool[Tensor, "b m"]
    negative: Bool[Tensor, "b m"]
    pair: Float[Tensor, " b"]
    discount: Float[Tensor, "b m"] | None = None


def contrasts(pairs: PairRows) -> Iterator[Contrast]:
    """Images against captions, then captions against images."""
    image, text, ids, peers, bank = pairs.image, pairs.text, pairs.ids, pairs.peers, pairs.bank
    remembered = (None, None) if bank is None else (bank.text, bank.image)
    slots = None if bank is None else bank.ids
    yield contrast(image, text, ids, peers, remembered[0], slots)
    yield contrast(text, image, ids, peers, remembered[1], slots)


def contrast(
    rows: Float[Tensor, "b d"],
    partners: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    peers: Peers,
    remembered: Float[Tensor, "k d"] | None = None,
    slots: Int64[Tensor, " k"] | None = None,
) -> Contrast:
    """This rank's rows against every rank's partners and the remembered ones.

    Args:
        rows: Unit rows.
        partners: Unit rows of the other modality; row i belongs to row i.
        ids: Identity of each row.
        peers: The ranks that contrast together.
        remembered: Further columns, without a gradient.
        slots: Identity of each remembered column; -1 where there is none yet.
    """
    rows, columns = wide(rows), peers.columns(wide(partners))
    positive = ids[:, None] == peers.columns(ids)[None, :]
    negative = ~positive
    if remembered is not None and slots is not None:
        columns = torch.cat([columns, remembered.to(columns.dtype)])
        other = (ids[:, None] != slots[None, :]) & (slots >= 0)
        positive = torch.cat([positive, torch.zeros_like(other)], dim=1)
        negative = torch.cat([negative, other], dim=1)
    similarity = rows @ columns.T
    first = peers.first_row(len(rows))
    own = torch.arange(first, first + len(rows), device=rows.device)
    return Contrast(similarity, positive, negative, similarity.gather(1, own[:, None])[:, 0])


def two_views(pairs: PairRows) -> Contrast:
    """Both modalities as views of one thing: each row against all rows of both but itself."""
    image, text, ids, peers = pairs.image, pairs.text, pairs.ids, pairs.peers
    rows = torch.cat([wide(image), wide(text)])
    columns = torch.cat([peers.columns(wide(image)), peers.columns(wide(text))])
    same = (ids[:, None] == peers.columns(ids)[None, :]).repeat(2, 2)
    num_rows, half = len(ids), len(columns) // 2
    own = torch.arange(num_rows, device=rows.device) + peers.first_row(num_rows)
    itself, partner = torch.cat([own, own + half]), torch.cat([own + half, own])
    positive = same.scatter(1, itself[:, None], False)
    similarity = rows @ columns.T
    return Contrast(similarity, positive, ~same, similarity.gather(1, partner[:, None])[:, 0])


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
