"""Figures of the shared space: do matched pairs stand out, and what do the two clouds look like.

All from one image a row and its first caption, in float64. The trainer's probe, the evaluation and
the doctor read the same dictionary.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mmscale.contracts import Peers
from mmscale.diagnostics.pairs import Pairs, on_grid, one_to_one, require_finite
from mmscale.diagnostics.spectrum import tower_figures
from mmscale.parallel.peers import Alone

PREFIX = "health/"
LARGEST_SAMPLE = 4096
PROBE_ROWS = 256
FEWEST_PAIRS = 4

# Deviations of cosines below this are rounding of fp32 rows: nothing is measured on them.
_RESOLUTION = 1e-8


def health_figures(pairs: Pairs, limit: int = LARGEST_SAMPLE) -> dict[str, float]:
    """Every figure under `health/`, those of one modality ending in `_image` or `_text`.

    At most `limit` distinct images are compared; features of the towers are described where they
    are given. With fewer than `FEWEST_PAIRS` only their number,
    `health/pairs`, is given.

    Raises:
        DataError: A row that is compared is not finite.
    """
    sample = one_to_one(pairs, limit)
    require_finite(sample)
    num, width = sample.image.shape
    figures: dict[str, float] = {"pairs": float(num)}
    if num >= FEWEST_PAIRS:
        image, text = sample.image.double(), sample.text.double()
        similarity = on_grid(sample.image) @ on_grid(sample.text).T
        figures |= similarity_figures(similarity, width) | hub_figures(similarity)
        if sample.logit_scale is not None:
            figures |= contrast_figures(similarity, sample.logit_scale)
        figures["gap"] = float((image.mean(dim=0) - text.mean(dim=0)).norm())
        figures["alignment"] = float((image - text).square().sum(dim=1).mean())
        for name, rows in (("image", image), ("text", text)):
            tower = tower_figures(rows) | crowd_figures(rows)
            figures |= {f"{key}_{name}": value for key, value in tower.items()}
            backbone = getattr(sample, f"backbone_{name}")
            if backbone is not None:
                figures |= feature_figures(backbone, Alone(), "tower", name)
    return {f"{PREFIX}{name}": value for name, value in figures.items()}


def similarity_figures(similarity: Float64[Tensor, "n n"], width: int) -> dict[str, float]:
    """How far the diagonal (matched pairs) stands out of the rest.

    Args:
        similarity: Cosines; row i and column i belong together, all other cells do not.
        width: Width of the space.

    Returns:
        `delta`: matched less unmatched mean. `delta_z`: the diagonal's mean against random pairings
        of the same rows. `auc`: chance that a matched pair is more similar than an unmatched one;
        `auc_centred`: the same without what each row and each column has in common.
        `std_off_sqrt_d`: 1 if unmatched pairs are as similar as random directions. `row_share`,
        `column_share`: of the similarity's variance, what only the image, only the caption decides.
        Accuracies within this sample, ties lost.
    """
    num = len(similarity)
    matched = similarity.diagonal()
    off_mean, off_std = _off_diagonal(similarity)
    delta = float(matched.mean()) - off_mean
    spread = math.sqrt((float(matched.var(unbiased=False)) + off_std**2) / 2)
    rivals = similarity.clone()
    rivals.fill_diagonal_(-torch.inf)
    return {
        "matched": float(matched.mean()),
        "unmatched": off_mean,
        "delta": delta,
        "d_prime": delta / spread if spread > _RESOLUTION else 0.0,
        "std_off_sqrt_d": off_std * math.sqrt(width),
        "auc": _auc(similarity),
        "accuracy_i2t": float((matched > rivals.amax(dim=1)).double().mean()),
        "accuracy_t2i": float((matched > rivals.amax(dim=0)).double().mean()),
        "accuracy_chance": 1 / num,
        **_centred_figures(similarity),
    }


def _centred_figures(similarity: Float64[Tensor, "n n"]) -> dict[str, float]:
    """What is left of the diagonal once row and column means are taken out.

    Over all pairings of the same rows the diagonal's mean has the variance sum(C^2) / (n^2 (n -
    1)), C being the doubly centred cosines; the plain deviation of cells over sqrt(n) overstates
    it.
    """
    num = len(similarity)
    rows = similarity.mean(dim=1, keepdim=True)
    columns = similarity.mean(dim=0, keepdim=True)
    mean = similarity.mean()
    centred = similarity - rows - columns + mean
    deviation = float(centred.square().mean().sqrt())
    variance = float((similarity - mean).square().mean())
    measured = deviation > _RESOLUTION
    shares = [float(part.var(unbiased=False)) / max(variance, 1e-300) for part in (rows, columns)]
    varies = math.sqrt(variance) > _RESOLUTION
    return {
        "delta_z": float(centred.diagonal().mean()) / deviation * math.sqrt(num - 1)
        if measured
        else 0.0,
        "auc_centred": _auc(centred) if measured else 0.5,
        "row_share": shares[0] if varies else 0.0,
        "column_share": shares[1] if varies else 0.0,
    }


def _off_diagonal(similarity: Float64[Tensor, "n n"]) -> tuple[float, float]:
    """Mean and deviation of the cells beside the diagonal."""
    num = len(similarity)
    cells = num * (num - 1)
    mean = float(similarity.sum() - similarity.diagonal().sum()) / cells
    squares = (similarity - mean).square()
    return mean, math.sqrt(max(0.0, float(squares.sum() - squares.diagonal().sum()) / cells))


def _auc(similarity: Float64[Tensor, "n n"]) -> float:
    """Share of (diagonal, other) cell pairs that the diagonal wins; a tie is half."""
    num = len(similarity)
    diagonal = similarity.diagonal().sort().values.contiguous()
    not_above = torch.searchsorted(diagonal, similarity, right=True).sum()
    below = torch.searchsorted(diagonal, similarity, right=False).sum()
    won = num**3 - (float(not_above) + float(below)) / 2
    # The diagonal against itself, ties half, is always n^2 / 2.
    return (won - num**2 / 2) / (num**2 * (num - 1))


def contrast_figures(similarity: Float64[Tensor, "n n"], scale: float) -> dict[str, float]:
    """What InfoNCE says of these pairs.

    Args:
        similarity: Cosines; row i and column i belong together.
        scale: 1 / temperature.

    Returns:
        `logit_scale`; `loss`, nats; `loss_chance`: ln n; `loss_floor`: the least that unit vectors
        reach at this scale; `loss_progress`: 0 at chance, 1 at the floor, negative above chance.

    Source: the floor is that of n pairs on a regular simplex (Lu and Steinerberger 2022, "Neural
        collapse under cross-entropy loss", theorem 1).
    """
    num = len(similarity)
    logits = scale * similarity
    matched = float(logits.diagonal().mean())
    rows, columns = (float(logits.logsumexp(dim).mean()) for dim in (1, 0))
    loss, chance, floor = (rows + columns) / 2 - matched, math.log(num), loss_floor(num, scale)
    return {
        "logit_scale": scale,
        "loss": loss,
        "loss_chance": chance,
        "loss_floor": floor,
        "loss_progress": (chance - loss) / (chance - floor),
    }


def loss_floor(num: int, scale: float) -> float:
    """ln(1 + (n - 1) exp(-s n / (n - 1))): matched cosines 1, all others -1 / (n - 1)."""
    return math.log1p((num - 1) * math.exp(-scale * num / (num - 1)))


# Neighbours counted a query; fewer in small samples, where ten would be a large share of all.
_NEIGHBOURS = 10
# An item's nearest other at less than this share of the usual distance is the same item again:
# between photographs of COCO it is 0.08 at least, between scenes of a few factors 0.001.
_SAME = 3e-4


def hub_figures(similarity: Float64[Tensor, "n n"]) -> dict[str, float]:
    """How unevenly the items are chosen as neighbours.

    Args:
        similarity: Cosines; row i and column i belong together.

    Returns:
        `hub_skew_i2t`: skewness over captions of how many images have it among their nearest; 0 if
        all are chosen alike. `uncovered_i2t`: share of captions that are no image's nearest.
        `hub_share_i2t`: share of the images whose nearest is the most chosen caption. The same for
        `_t2i`.

    Source: Radovanovic et al. 2010, "Hubs in Space", section 2 (N_k skewness).
    """
    num = len(similarity)
    k = max(1, min(_NEIGHBOURS, num // 8))
    figures: dict[str, float] = {}
    for name, queries in (("i2t", similarity), ("t2i", similarity.T)):
        nearest = queries.topk(k, dim=1).indices
        chosen = torch.bincount(nearest.flatten(), minlength=num).double()
        first = torch.bincount(nearest[:, 0], minlength=num)
        centred = chosen - chosen.mean()
        spread = float(centred.square().mean())
        skew = float(centred.pow(3).mean()) / spread**1.5 if spread > 0 else 0.0
        figures[f"hub_skew_{name}"] = skew
        figures[f"uncovered_{name}"] = float((first == 0).double().mean())
        figures[f"hub_share_{name}"] = float(first.max()) / num
    return figures


def crowd_figures(rows: Float64[Tensor, "n d"]) -> dict[str, float]:
    """How a tower's unit rows lie to one another, whatever their ids.

    Returns:
        `uniformity`: ln of the mean of exp(-2 |x - x'|^2) over different rows; -4 for isotropic
        rows of large width, 0 where all are equal. `twins`: share of rows that another row repeats,
        being closer than `_SAME` of the mean distance (1 - cosine); 0 without any spread.

    Source: Wang and Isola 2020 (arXiv 2005.10242), equation 4.
    """
    num = len(rows)
    cosines = rows @ rows.T
    cells = num * (num - 1)
    # |x - x'|^2 = 2 - 2 x.x' for unit rows.
    potential = (4 * cosines - 4).exp()
    others = float(potential.sum()) - float(potential.trace())
    usual = 1 - (float(cosines.sum()) - float(cosines.trace())) / cells
    cosines.fill_diagonal_(-1.0)
    twins = (1 - cosines.amax(dim=1) < _SAME * usual).double().mean() if usual > 1e-6 else 0.0
    return {"uniformity": math.log(others / cells), "twins": float(twins)}


# A dimension whose deviation is below this share of the median one carries nothing.
LOW_SHARE = 0.01

# Variance of a dimension, as a share of its mean square, below which there is only rounding.
_LEAST_VARIANCE = 1e-12


def feature_figures(
    rows: Float[Tensor, "b f"], peers: Peers, place: str, modality: str
) -> dict[str, float]:
    """What a tower or a head gives for the rows of all ranks. Collective.

    Args:
        rows: This rank's rows.
        peers: All ranks.
        place: `tower` or `head`: where the rows were taken.
        modality: `image` or `text`.

    Returns:
        Under `PLACE_NAME_MODALITY`: `mean` and `std` of all entries; `low` and `high`: the least
        and the greatest; `norm`: mean length of a row; `norm_spread`: deviation of the lengths, as
        a share of it; `spread`: mean variance of a dimension over rows, as a share of its mean
        square (0 where every row is the same); `low_dims`: dimensions whose deviation is under
        `LOW_SHARE` of the median one, all where that is zero.
    """
    total, square, low, high = _sums(rows, peers)
    count, norm, norm_square = (float(value) for value in total[-3:])
    mean, mean_square = total[:-3] / count, square / count
    variance = (mean_square - mean.square()).clamp(min=0.0)
    variance = torch.where(variance > _LEAST_VARIANCE * mean_square, variance, 0.0)
    deviation = variance.sqrt()
    middle = float(deviation.median())
    overall = float(mean_square.mean()) - float(mean.mean()) ** 2
    length = norm / count
    figures = {
        "mean": float(mean.mean()),
        "std": math.sqrt(max(0.0, overall)),
        "low": float(low),
        "high": float(high),
        "norm": length,
        "norm_spread": _ratio(math.sqrt(max(0.0, norm_square / count - length**2)), length),
        "spread": _ratio(float(variance.mean()), float(mean_square.mean())),
        "low_dims": float((deviation <= LOW_SHARE * middle).sum()),
    }
    return {f"{place}_{name}_{modality}": value for name, value in figures.items()}


def _sums(
    rows: Float[Tensor, "b f"], peers: Peers
) -> tuple[Float64[Tensor, " g"], Float64[Tensor, " f"], Tensor, Tensor]:
    """Over all ranks, in the order of the result.

    Returns:
        Sums of each dimension, then the number of rows, the sum of their lengths and that of the
        lengths' squares; sums of squares of each dimension; the least and the greatest entry.
    """
    wide = rows.detach().double()
    lengths = wide.norm(dim=1)
    width = wide.shape[1]
    mine = torch.cat(
        [
            wide.sum(dim=0),
            torch.stack([wide.new_tensor(len(wide)), lengths.sum(), lengths.square().sum()]),
            wide.square().sum(dim=0),
            torch.stack([wide.min(), wide.max()]),
        ]
    )
    ranks = peers.columns(mine[None]).cpu()
    total = ranks.sum(dim=0)
    return (
        total[: width + 3],
        total[width + 3 : 2 * width + 3],
        ranks[:, -2].amin(),
        ranks[:, -1].amax(),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
