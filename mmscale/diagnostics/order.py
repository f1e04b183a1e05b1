"""Do the captions stand in other rows: shifted, reversed, or in no order that can be named.

Asked where matched pairs do not stand out: of towers that never met no order of the rows fits.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from mmscale.diagnostics.mixture import other_cells, share_figures, standing, standing_rows
from mmscale.diagnostics.pairs import Pairs, one_to_one

FEWEST_PAIRS = 32
LARGEST_SAMPLE = 2**16
# Rows among which any order at all is looked for.
_SEARCHED = 2048
_FEATURES_AT_ONCE = 64
# The largest of all shifts passes 5 about once in 2,000 samples without any order.
SURE = 7.0
# Beside a sure one: rows at a block's end take captions from its beginning.
_SURE_BESIDE = 5.0
_RESOLUTION = 1e-9


def order_figures(pairs: Pairs) -> dict[str, float]:
    """What speaks for captions that stand in other rows; nothing with fewer than `FEWEST_PAIRS`.

    Returns:
        `shift_z`: how far one shift of the rows stands above others, in their robust deviations;
        `reversed_z`: the same of reversed rows; `elsewhere_z`: of `elsewhere`. Where the first is
        at least `SURE`, `shift`: image row i fits the caption of row i + shift; `shift_share`: the
        share of rows that it fits; `shift_block`: rows of a block within which they are shifted, 0
        for all rows in one. Where the second is, `reversed_shift`: image row i fits the caption of
        row n - 1 - i + shift; `reversed_share`.
    """
    sample = one_to_one(pairs, in_turn=True)
    image, text = sample.image[:LARGEST_SAMPLE], sample.text[:LARGEST_SAMPLE]
    if len(image) < FEWEST_PAIRS:
        return {}
    rows, columns = standing_rows(image, text)
    others = other_cells(rows, columns)
    figures = {"elsewhere_z": elsewhere(rows[:_SEARCHED], columns[:_SEARCHED])}
    for name, turned in (("shift", rows), ("reversed", rows.flip(0))):
        peaks = _peaks(_along(turned, columns))
        if name == "shift":
            # What every healthy space has.
            peaks[0] = 0.0
        place = int(peaks.argmax())
        figures[f"{name}_z"] = float(peaks[place])
        if peaks[place] < SURE:
            continue
        own = (turned * columns.roll(-place, dims=0)).sum(dim=1)
        figures[f"{name}_share"] = share_figures(standing(own, others))["matched_share"]
        figures["shift" if name == "shift" else "reversed_shift"] = float(_signed(place, len(rows)))
        if name == "shift":
            figures["shift_block"] = float(_block(peaks, place))
    return {f"health/{name}": value for name, value in figures.items()}


def elsewhere(rows: Float64[Tensor, "n d"], columns: Float64[Tensor, "n d"]) -> float:
    """Whether images find captions that fit at all, in whatever rows: like a normal deviate.

    Two tests, of which the surer counts: the first needs few rows and many directions, the second
    the reverse.
    """
    return max(_agreement(rows, columns), _outstanding(rows, columns))


def _agreement(rows: Float64[Tensor, "n d"], columns: Float64[Tensor, "n d"]) -> float:
    """Whether half of the directions think that captions fit which the others chose.

    In a basis in which neither side's coordinates covary, the nearest caption is looked up by every
    second direction, and the others are asked whether it fits. In a space that the towers do not
    share, a direction's answer is as often yes as no; where they share it, all say yes. At most the
    root of the number of directions.

    Source: Efron 1969, "Student's t-test under symmetry conditions": sums of values with random
    signs, over the root of their squares' sum.
    """
    left, right, scales = _uncorrelated(rows, columns)
    answers = torch.zeros(len(scales), dtype=torch.float64)
    for start in (0, 1):
        looked, asked = slice(start, None, 2), slice(1 - start, None, 2)
        similarity = left[:, looked] @ right[:, looked].T
        nearest, askers = similarity.argmax(dim=1), similarity.argmax(dim=0)
        fits = (left[:, asked] * right[nearest][:, asked]).sum(dim=0)
        fits += (left[askers][:, asked] * right[:, asked]).sum(dim=0)
        answers[asked] = fits / scales[asked]
    size = float(answers.norm())
    return float(answers.sum()) / size if size > 0 else 0.0


def _outstanding(rows: Float64[Tensor, "n d"], columns: Float64[Tensor, "n d"]) -> float:
    """Whether one caption stands out for each image, and one image for each caption.

    Of captions that have nothing to do with an image, the first leads the second by more than twice
    what the second leads the third half of the time, as spacings of exponential tails do; in
    spaces of few directions less often.

    Source: Renyi 1953, "On the theory of order statistics": such spacings, times their rank, are
    independent of one law.
    """
    similarity = rows @ columns.T
    leads = torch.cat(
        [side.topk(3, dim=1).values.diff(dim=1).neg() for side in (similarity, similarity.T)]
    )
    share = float((leads[:, 0] > 2 * leads[:, 1]).double().mean())
    # The same few items are chosen by several: counted as if one side only had been asked.
    return (2 * share - 1) * math.sqrt(len(rows))


def _uncorrelated(
    rows: Float64[Tensor, "n d"], columns: Float64[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "n k"], Float64[Tensor, " k"]]:
    """The same products in coordinates that do not covary; the last are the right side's scales."""
    values, basis = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = values > _RESOLUTION * values.max().clamp(min=_RESOLUTION)
    lengths = values[kept].sqrt()
    left, right = rows @ basis[:, kept] / lengths, columns @ basis[:, kept] * lengths
    values, turned = torch.linalg.eigh(right.T @ right / len(right))
    kept = values > _RESOLUTION * values.sum().clamp(min=_RESOLUTION)
    turned = turned[:, kept].flip(1)
    return left @ turned, right @ turned, values[kept].flip(0).sqrt()


def _along(rows: Float64[Tensor, "n d"], columns: Float64[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """For each k the sum over i of the product of row i and column i + k, in a turn."""
    num = len(rows)
    total = torch.zeros(num // 2 + 1, dtype=torch.complex128)
    for left, right in zip(
        rows.split(_FEATURES_AT_ONCE, dim=1), columns.split(_FEATURES_AT_ONCE, dim=1), strict=True
    ):
        turned = torch.fft.rfft(left, dim=0).conj() * torch.fft.rfft(right, dim=0)
        total += turned.sum(dim=1)
    return torch.fft.irfft(total, n=num)


def _peaks(sums: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """How far each stands above all, in robust deviations of them.

    Rows that resemble each other, sorted or not, widen all of them alike.
    """
    above = sums - sums.median()
    spread = 1.4826 * float(above.abs().median())
    return above / spread if spread > _RESOLUTION else torch.zeros_like(above)


def _block(shifts: Float64[Tensor, " n"], best: int) -> int:
    """Rows of a block whose last ones take the captions of its first; 0 where there are none."""
    rest = shifts.clone()
    rest[[0, best]] = 0.0
    second = int(rest.argmax())
    one, other = _signed(best, len(shifts)), _signed(second, len(shifts))
    length = abs(one - other)
    wraps = one * other < 0 and length < len(shifts)
    return length if wraps and float(rest[second]) > _SURE_BESIDE else 0


def _signed(place: int, num: int) -> int:
    return place if place <= num // 2 else place - num
