"""Triton kernels over blocks of logits: sums of a block's rows and columns, and its gradient.

Each program owns what it writes: nothing is added to from two sides, so that the same input gives
the same bits. Logits are s x_i.y_j + bias; a column counts for a row as a positive where it has the
row's id and comes before `first_negative`, as a negative where it has another id, and else not at
all, like an empty slot (id -1). Row-major matrices; `b` rows, `n` columns, `d` dimensions.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _block(
    x, y, row_ids, column_ids, row, column, b, n, d, first_negative,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of a block, where its positives are, and which of its entries count."""
    products = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BK):
        at = start + tl.arange(0, BK)
        is_row = (row[:, None] < b) & (at[None, :] < d)
        is_column = (column[None, :] < n) & (at[:, None] < d)
        left = tl.load(x + row[:, None] * d + at[None, :], mask=is_row, other=0.0)
        right = tl.load(y + column[None, :] * d + at[:, None], mask=is_column, other=0.0)
        products = tl.dot(left, right, products, input_precision=PRECISION)
    own = tl.load(row_ids + row, mask=row < b, other=-2)
    other = tl.load(column_ids + column, mask=column < n, other=-1)
    same = own[:, None] == other[None, :]
    inside = (row[:, None] < b) & (column[None, :] < n)
    positive = inside & same & (column[None, :] < first_negative)
    counted = positive | (inside & (same == 0) & (other[None, :] >= 0))
    return products, positive, counted


@triton.jit
@no_type_check
def softmax_sums(
    x, y, scale, row_ids, column_ids, row_sums, positives, counts, column_sums,
    b, n, d, first_negative, columns_of_a_split,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of rows over a split of the columns, and of columns over a block of rows.

    Writes `row_sums`, `positives` (sums of positive logits) and `counts` (how many) [splits b], and
    `column_sums` [row_blocks n]; the last three only where BOTH.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row, s = block * BM + tl.arange(0, BM), tl.load(scale)
    low = float("-inf")
    top = tl.full((BM,), low, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    positive_sum = tl.zeros((BM,), tl.float32)
    count = tl.zeros((BM,), tl.float32)
    begin = split * columns_of_a_split
    for start in range(begin, tl.minimum(begin + columns_of_a_split, n), BN):
        column = start + tl.arange(0, BN)
        products, positive, counted = _block(
            x, y, row_ids, column_ids, row, column, b, n, d, first_negative, BM, BN, BK, PRECISION
        )  # fmt: skip
        logits = tl.where(counted, products * s, low)
        highest = tl.maximum(top, tl.max(logits, 1))
        # Where nothing counts yet: -inf - -inf is NaN.
        shift = tl.where(highest == low, 0.0, highest)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = highest
        if BOTH:
            peak = tl.max(logits, 0)
            peak = tl.where(peak == low, 0.0, peak)
            sums = peak + tl.log(tl.sum(tl.exp(logits - peak[None, :]), 0))
            tl.store(column_sums + block * n + column, sums, mask=column < n)
            positive_sum += tl.sum(tl.where(positive, logits, 0.0), 1)
            count += tl.sum(tl.where(positive, 1.0, 0.0), 1)
    place = split * b + row
    tl.store(row_sums + place, tl.where(top == low, low, top + tl.log(total)), mask=row < b)
    if BOTH:
        tl.store(positives + place, positive_sum, mask=row < b)
        tl.store(counts + place, count, mask=row < b)


@triton.jit
@no_type_check
def softmax_gradient(
    x, y, scale, row_ids, column_ids, row_sums, column_sums, row_grad, column_grad, positive_grad,
    out, b, n, d, first_negative, first, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Gradients to the logits of `width` columns from `first` on, [b width], in the dtype of `out`.

    `positive_grad` is that to each of a row's positive logits.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    place = tl.program_id(1) * BN + tl.arange(0, BN)
    column, s = first + place, tl.load(scale)
    products, positive, counted = _block(
        x, y, row_ids, column_ids, row, column, b, n, d, first_negative, BM, BN, BK, PRECISION
    )  # fmt: skip
    low = float("-inf")
    logits = tl.where(counted, products * s, low)
    sums = tl.load(row_sums + row, mask=row < b, other=0.0)
    sums = tl.where(sums == low, 0.0, sums)
    weight = tl.load(row_grad + row, mask=row < b, other=0.0)
    grad = tl.exp(logits - sums[:, None]) * weight[:, None]
    if BOTH:
        sums = tl.load(column_sums + column, mask=column < n, other=0.0)
        weight = tl.load(column_grad + column, mask=column < n, other=0.0)
        grad += tl.exp(logits - sums[None, :]) * weight[None, :]
        pull = tl.load(positive_grad + row, mask=row < b, other=0.0)
        grad += tl.where(positive, pull[:, None], 0.0)
    inside = (row[:, None] < b) & (place[None, :] < width)
    to = out + row[:, None] * width + place[None, :]
    tl.store(to, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def sigmoid_sums(
    x, y, scale, bias, row_ids, column_ids, row_sums,
    b, n, d, first_negative, columns_of_a_split,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each row's sum of log(1 + exp(-z logit)) over a split, z = 1 for positives and -1 for others.

    Writes `row_sums` [splits b].
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row, s, shift = block * BM + tl.arange(0, BM), tl.load(scale), tl.load(bias)
    total = tl.zeros((BM,), tl.float32)
    begin = split * columns_of_a_split
    for start in range(begin, tl.minimum(begin + columns_of_a_split, n), BN):
        column = start + tl.arange(0, BN)
        products, positive, counted = _block(
            x, y, row_ids, column_ids, row, column, b, n, d, first_negative, BM, BN, BK, PRECISION
        )  # fmt: skip
        logits = products * s + shift
        against = tl.where(positive, -logits, logits)
        small = tl.exp(-tl.abs(against))
        # 1 + small loses what is far below 1, of which there are n.
        series = small * (1 - small * (0.5 - small * (1 / 3 - small * 0.25)))
        surprise = tl.maximum(against, 0.0) + tl.where(small < 0.03, series, tl.log(1 + small))
        total += tl.sum(tl.where(counted, surprise, 0.0), 1)
    tl.store(row_sums + split * b + row, total, mask=row < b)


@triton.jit
@no_type_check
def sigmoid_gradient(
    x, y, scale, bias, row_ids, column_ids, total_grad, out, row_grads,
    b, n, d, first_negative, first, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients to the logits of `width` columns from `first` on, [b width], in the dtype of `out`.

    Writes their sums by row and block of columns, [column_blocks b], too.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    place = tl.program_id(1) * BN + tl.arange(0, BN)
    products, positive, counted = _block(
        x, y, row_ids, column_ids, row, first + place, b, n, d, first_negative,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    logits = products * tl.load(scale) + tl.load(bias)
    against = tl.where(positive, -logits, logits)
    grad = tl.load(total_grad) / (1 + tl.exp(-against))
    inside = (row[:, None] < b) & (place[None, :] < width)
    grad = tl.where(counted & inside, tl.where(positive, -grad, grad), 0.0)
    to = out + row[:, None] * width + place[None, :]
    tl.store(to, grad.to(out.dtype.element_ty), mask=inside)
    tl.store(row_grads + tl.program_id(1) * b + row, tl.sum(grad, 1), mask=row < b)
