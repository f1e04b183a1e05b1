"""InfoNCE that never holds the logits: tiles, running sums, recomputation in backward.

The same loss as `softmax.infonce`, which is its reference, in four products of b x n x d: one
forward for both directions, one again in backward, one for each gradient. Memory beyond the rows
and their gradients does not grow with n: two tiles, and those that are kept for backward.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.contracts import Bank, Peers
from mmscale.loss.contrast import wide
from mmscale.loss.tiles import (
    RunningSums,
    running_sums,
    shift_for,
    shifted_exp,
    shifted_sums,
    tiles,
)


def infonce(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    bank: Bank | None = None,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Symmetric multi-positive InfoNCE as `softmax.infonce` has it; memory grows with n, not n².

    Means of logits need no logits: the mean of s x_i.y_p over positives p is s x_i times the mean
    of their y_p. Summed over all ranks' rows it is the same in both directions, so a rank counts
    that of its images twice: the mean over ranks is the loss of the global batch, as ever.

    Args:
        image: Unit rows of the images.
        text: Unit rows of the captions; row i belongs to image i.
        ids: Identity of each row.
        scale: 1 / temperature.
        peers: The ranks that contrast together.
        bank: Further negatives; those of a row's own id are left out.
        smoothing: Share of the target that goes to all columns alike.
    """
    columns, first = peers.columns(wide(text)), peers.first_row(len(text))
    contrast = _Contrast.apply(image, columns, scale, peers.columns(ids), first)
    image_sum, column_sum, positive = contrast
    text_sum = peers.logsumexp(column_sum)[first : first + len(text)]
    slots, captions, pictures = (
        (None, None, None) if bank is None else (bank.ids, bank.text, bank.image)
    )
    if bank is not None:
        image_bank_sum = _BankSum.apply(image, bank.text, scale, ids, bank.ids)
        text_bank_sum = _BankSum.apply(text, bank.image, scale, ids, bank.ids)
        image_sum = torch.logaddexp(image_sum, image_bank_sum)
        text_sum = torch.logaddexp(text_sum, text_bank_sum)
    target = positive.mean()
    if smoothing:
        to_text = _mean_logits(image, text, ids, scale, peers, captions, slots)
        to_image = _mean_logits(text, image, ids, scale, peers, pictures, slots)
        target = (1 - smoothing) * target + smoothing * (to_text.mean() + to_image.mean()) / 2
    loss: Tensor = (image_sum.mean() + text_sum.mean()) / 2 - target
    return loss


class _Contrast(torch.autograd.Function):
    """Log-sum-exp of every row and of every column, and each row's mean positive logit.

    One exponential of a logit serves its row and its column as long as one shift suits all of
    them, as it does for unit rows at scales up to 100 but for rows that resemble nothing at all.
    Then row and column each have a shift, and an exponential, of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, column_ids: Tensor, first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y, s = _like(rows, columns, scale)
        ctx.shift, ctx.kept = shift_for(x, y, s), []
        sums = shifted_sums(x, y, s, ctx.shift, ctx.kept)
        if sums is None:
            ctx.shift, ctx.kept = None, []
            sums = logs = running_sums(x, y, s)
        else:
            logs = sums[0].log() + ctx.shift, sums[1].log() + ctx.shift
        _, slots, counts = column_ids.unique(return_inverse=True, return_counts=True)
        row_slots = slots[first : first + len(x)]
        partners = _summed(y, slots, len(counts))[row_slots]
        positive = partners.mul_(x).sum(1) * s / counts[row_slots]
        ctx.save_for_backward(rows, columns, scale, slots, row_slots, counts, *sums)
        return *logs, positive

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_grad: Tensor, column_grad: Tensor, positive_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, columns, scale, slots, row_slots, counts, row_sum, column_sum = ctx.saved_tensors
        x, y, s = _like(rows, columns, scale)
        weight = (positive_grad / counts[row_slots])[:, None]
        y_grad = _summed(x * weight, row_slots, len(counts))[slots]
        x_grad = _summed(y, slots, len(counts))[row_slots].mul_(weight)
        # None is left to another backward, which computes them all.
        num_kept = len(ctx.kept)
        if ctx.shift is not None:
            row_grad, column_grad = row_grad / row_sum, column_grad / column_sum
        for index, (r, c, tile, work) in enumerate(tiles(x, y, s, ctx.kept)):
            if ctx.shift is None:
                torch.sub(tile, row_sum[r, None], out=work).exp_().mul_(row_grad[r, None])
                tile.sub_(column_sum[c]).exp_()
                torch.addcmul(work, tile, column_grad[c], out=tile)
            else:
                if index >= num_kept:
                    shifted_exp(tile, ctx.shift)
                tile.mul_(torch.add(row_grad[r, None], column_grad[c], out=work))
            x_grad[r].addmm_(tile, y[c])
            y_grad[c].addmm_(tile.T, x[r])
        scale_grad = _inner(x, x_grad)
        return (
            x_grad.mul_(s).to(rows.dtype),
            y_grad.mul_(s).to(columns.dtype),
            scale_grad.to(scale.dtype).view_as(scale),
            None,
            None,
        )


class _BankSum(torch.autograd.Function):
    """Log-sum-exp of every row over remembered columns; -inf where all are hidden."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bank: Tensor, scale: Tensor, ids: Tensor, bank_ids: Tensor
    ) -> Tensor:
        x, y, s = _like(rows, bank, scale)
        sums = RunningSums(x)
        for r, c, tile, work in tiles(x, y, s):
            tile.masked_fill_(_hidden(ids[r], bank_ids[c]), -torch.inf)
            sums.add(r, tile, work, 1)
        total = sums.value()
        ctx.save_for_backward(rows, bank, scale, ids, bank_ids, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        rows, bank, scale, ids, bank_ids, total = ctx.saved_tensors
        x, y, s = _like(rows, bank, scale)
        # Where all is hidden the logits are -inf too, and -inf - -inf is NaN.
        total = total.clamp(min=torch.finfo(total.dtype).min)
        x_grad = torch.zeros_like(x)
        for r, c, tile, _ in tiles(x, y, s):
            tile.masked_fill_(_hidden(ids[r], bank_ids[c]), -torch.inf)
            tile.sub_(total[r, None]).exp_().mul_(grad[r, None])
            x_grad[r].addmm_(tile, y[c])
        scale_grad = _inner(x, x_grad)
        return (
            x_grad.mul_(s).to(rows.dtype),
            None,
            scale_grad.to(scale.dtype).view_as(scale),
            None,
            None,
        )


def _mean_logits(
    rows: Float[Tensor, "b d"],
    partners: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    scale: Float[Tensor, "1"],
    peers: Peers,
    remembered: Float[Tensor, "k d"] | None,
    slots: Int64[Tensor, " k"] | None,
) -> Float[Tensor, " b"]:
    """Each row's mean logit over all columns that it sees."""
    total, count = peers.total(wide(partners).sum(0)), len(partners) * peers.size
    if remembered is None or slots is None:
        return scale * (wide(rows) @ total) / count
    filled = slots >= 0
    _, places = torch.cat([ids, slots[filled]]).unique(return_inverse=True)
    own, kept = places.split([len(ids), int(filled.sum())])
    sums = _summed(remembered[filled].to(total.dtype), kept, len(places))
    counts = kept.bincount(minlength=len(places))
    seen = total + sums.sum(0) - sums[own]
    counts = count + len(kept) - counts[own]
    mean: Tensor = scale * (wide(rows) * seen).sum(1) / counts
    return mean


def _hidden(ids: Int64[Tensor, " b"], bank_ids: Int64[Tensor, " k"]) -> Bool[Tensor, "b k"]:
    return (ids[:, None] == bank_ids) | (bank_ids < 0)


def _summed(
    rows: Float[Tensor, "m d"], slots: Int64[Tensor, " m"], num_slots: int
) -> Float[Tensor, "slots d"]:
    return rows.new_zeros(num_slots, rows.shape[1]).index_add_(0, slots, rows)


def _inner(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _like(rows: Tensor, *others: Tensor) -> list[Tensor]:
    """Rows in fp32 or wider, and the others in the same dtype; without a graph."""
    widened = wide(rows.detach())
    return [widened, *(other.detach().to(widened.dtype) for other in others)]
