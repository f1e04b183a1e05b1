"""Do captions stand some rows from their images: all of them, a shard's, or those of a stretch.

Which caption fits an image is asked within a window of rows. Where towers share no space, a map is
learnt between them from rows of other blocks, at the shift at which captions tell most of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mmscale.diagnostics.dataset.held_out_map import COARSE, FOLDS, Whitened, held_out_rows
from mmscale.diagnostics.dataset.verdict import (
    MOST_EXAMPLES,
    DataVerdict,
    Example,
    Looks,
    wilson,
)
from mmscale.diagnostics.mixture import standing_rows

FEWEST_ROWS = 128
WINDOW = 64
# Rows from the beginning that are looked at.
_LARGEST_SAMPLE = 2**16
_SHORTEST = 16
# Of all shifts, places and lengths, chance comes to about 6.5; rows in an order that means
# something come a little further.
SURE = 8.0
_SURE_OVERALL = 7.0
_MOST = 20
# Of a set that is shifted as a whole nothing would be left.
_MOST_SHARE = 0.5
# Directions of either side, those of most variance, that are asked whether they covary.
_DIRECTIONS = 48


@dataclass(frozen=True)
class Stretch:
    """Rows whose images fit the captions of other rows.

    Attributes:
        shift: The image of row i fits the caption of row i + shift.
        first: Where the stretch begins.
        end: The row after its last.
        z: How far the fit stands above that of its own captions, in deviations of chance.
    """

    shift: int
    first: int
    end: int
    z: float


@dataclass(frozen=True)
class Shifted:
    """Stretches, the surest first, and the share of all rows that lies in them."""

    stretches: tuple[Stretch, ...]
    share: float

    @property
    def shift(self) -> int:
        """That of most rows in stretches; 0 without any."""
        rows: dict[int, int] = {}
        for stretch in self.stretches:
            rows[stretch.shift] = rows.get(stretch.shift, 0) + stretch.end - stretch.first
        return max(rows, key=lambda shift: rows[shift], default=0)


def shifted_features(image: Float[Tensor, "n f"], text: Float[Tensor, "n g"]) -> Shifted:
    """Of towers that were never trained together.

    Args:
        image: Features in the data's order.
        text: Features of the captions of each; where it has several, their mean.
    """
    image, text = image[:_LARGEST_SAMPLE], text[:_LARGEST_SAMPLE]
    if len(image) < FEWEST_ROWS:
        return Shifted((), 0.0)
    sides = Whitened(image).by(COARSE.image), Whitened(text).by(COARSE.text)
    start = likeliest_shift(*sides)
    turned = sides[0], sides[1].roll(-start, dims=0)
    blocks = torch.arange(len(image)) * FOLDS // len(image)
    return _found(
        _gains(
            len(image),
            start,
            held_out_rows(turned, blocks, COARSE.power),
        )
    )


def shifted_embeddings(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"]) -> Shifted:
    """Of a model whose towers share a space; arguments as of `shifted_features`."""
    image, text = image[:_LARGEST_SAMPLE], text[:_LARGEST_SAMPLE]
    if len(image) < FEWEST_ROWS:
        return Shifted((), 0.0)
    return _found(_gains(len(image), 0, iter([(torch.arange(len(image)), image, text)])))


def likeliest_shift(image: Float[Tensor, "n f"], text: Float[Tensor, "n g"]) -> int:
    """The shift at which both sides covary most, 0 where none stands out.

    The sum of the squared covariances of evened-out coordinates: Pillai's trace.

    Args:
        image: Whitened features, coordinates of most variance first.
        text: Likewise.
    """
    left, right = image[:, :_DIRECTIONS], text[:, :_DIRECTIONS]
    shifts = _window(len(image))
    sums = torch.tensor(
        [float((left.T @ right.roll(-shift, dims=0)).double().square().sum()) for shift in shifts]
    )
    above = sums - sums.median()
    spread = 1.4826 * float(above.abs().median())
    best = int(above.argmax())
    return shifts[best] if float(above[best]) > _SURE_OVERALL * spread else 0


def _window(num: int) -> list[int]:
    width = min(WINDOW, num // 4)
    return list(range(-width, width + 1))


def _gains(
    num: int, start: int, blocks: Iterator[tuple[Tensor, Tensor, Tensor]]
) -> dict[int, Float64[Tensor, " n"]]:
    """For each shift how much better it fits each image than its own caption, in deviations.

    0 where the other caption lies in another block.
    """
    shifts = _window(num)
    # Cells are doubly standardised: the difference of two has the deviation root 2.
    gains = {shift: torch.zeros(num, dtype=torch.float64) for shift in shifts if shift}
    for part, image, text in blocks:
        rows, columns = standing_rows(image, text)
        own = _cells(rows, columns, -start)
        for shift, gain in gains.items():
            other = _cells(rows, columns, shift - start)
            gain[part] = ((other - own) / 2**0.5).nan_to_num(nan=0.0)
    return gains


def _cells(
    rows: Float64[Tensor, "m d"], columns: Float64[Tensor, "m d"], shift: int
) -> Float64[Tensor, " m"]:
    """Products of row i and column i + shift; NaN where there is no such column."""
    found = rows.new_full((len(rows),), torch.nan)
    first, end = max(0, -shift), min(len(rows), len(rows) - shift)
    if end > first:
        found[first:end] = (rows[first:end] * columns[first + shift : end + shift]).sum(dim=1)
    return found


def _found(gains: dict[int, Float64[Tensor, " n"]]) -> Shifted:
    num = len(next(iter(gains.values())))
    stretches: list[Stretch] = []
    best = {shift: _surest(gain) for shift, gain in gains.items()}
    while len(stretches) < _MOST:
        shift = max(best, key=lambda key: best[key])
        if best[shift] < SURE:
            break
        first, end = _largest_sum(gains[shift])
        stretches.append(Stretch(shift, first, end, best[shift]))
        for other, gain in gains.items():
            gain[first:end] = 0.0
            best[other] = _surest(gain)
    share = sum(stretch.end - stretch.first for stretch in stretches) / num
    return Shifted(tuple(sorted(stretches, key=lambda stretch: -stretch.z)), share)


def _surest(gain: Float64[Tensor, " n"]) -> float:
    """The largest sum of neighbouring values over the root of how many they are.

    Of lengths that grow by the root of 2: of any other, the best of them reaches nine tenths.
    """
    sums = torch.cat([gain.new_zeros(1), gain.cumsum(dim=0)])
    best, length = 0.0, float(_SHORTEST)
    while length < len(gain):
        step = int(length)
        best = max(best, float((sums[step:] - sums[:-step]).max()) / step**0.5)
        length *= 2**0.5
    return max(best, float(sums[-1]) / len(gain) ** 0.5)


def _largest_sum(gain: Float64[Tensor, " n"]) -> tuple[int, int]:
    """The neighbouring values of the largest sum: first one, and the one after the last."""
    sums = torch.cat([gain.new_zeros(1), gain.cumsum(dim=0)])
    rise = sums - sums.cummin(dim=0).values
    end = int(rise.argmax())
    return int(sums[: end + 1].argmin()), end


def shifted_captions(looks: Looks, found: Shifted) -> DataVerdict | None:
    """The verdict on a set.

    Args:
        looks: The images that were compared with their captions, in the data's order.
        found: Of the same rows.
    """
    if not found.stretches:
        return None
    count = sum(stretch.end - stretch.first for stretch in found.stretches)
    rows = sorted(row for s in found.stretches for row in range(s.first, s.end))
    is_whole = found.share > _MOST_SHARE
    return DataVerdict(
        "shifted_captions",
        found.share,
        wilson(count, len(looks)),
        len(looks),
        f"{count:,} of {len(looks):,} images fit the captions of an image {abs(found.shift)} "
        f"{'further on' if found.shift > 0 else 'before'} better than their own, in "
        f"{len(found.stretches)} stretch{'es' * (len(found.stretches) > 1)}",
        "mend the table that pairs images with captions: a line is missing or stands twice before "
        "the first of these rows",
        tuple(_example(looks, stretch) for stretch in found.stretches[:MOST_EXAMPLES]),
        {"shift": float(found.shift), "z": found.stretches[0].z},
        leave_out=() if is_whole else looks.ids_of(rows),
    )


def _example(looks: Looks, stretch: Stretch) -> Example:
    row = stretch.first if stretch.first + stretch.shift >= 0 else -stretch.shift
    partner = min(row + stretch.shift, len(looks) - 1)
    return looks.example(
        row,
        f"images {stretch.first:,} to {stretch.end - 1:,} fit the captions {stretch.shift:+d} rows "
        f"away: {(*looks.captions[partner], '')[0][:200]}",
        (looks, partner),
    )
