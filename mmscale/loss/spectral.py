"""The spectral contrastive loss."""

from dataclasses import replace

from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.loss import Precision, SpectralTerm
from mmscale.contracts import Peers
from mmscale.loss.contrast import Contrast, direction, wide
from mmscale.loss.strips import Sums, sum_over_rows
from mmscale.loss.term import Bounds, Given, TermValue, term


def spectral(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    ids: Int64[Tensor, " b"],
    peers: Peers,
    *,
    mu: float = 1.0,
    precision: Precision = "fp32",
) -> Float[Tensor, ""]:
    """Pull pairs together, push the squared products of other ids to zero.

    (-2 mean_i x_i.y_i + mean_{ij: id_i != id_j} (x_i.y_j)^2) / mu over rows that are shortened to
    length sqrt(mu) where they are longer.

    Args:
        image: The head's outputs for the images, not unit rows.
        text: The head's outputs for the captions; row i belongs to image i.
        ids: Identity of each row.
        peers: The ranks that contrast together.
        mu: Largest squared length of a row.
        precision: Of the products of rows and columns.

    Source: HaoChen et al. 2021, "Provable Guarantees for Self-Supervised Deep Learning with
        Spectral Contrastive Loss" (arXiv 2106.04156), equation 6 and algorithm 1.
    """
    image, text = _shortened(image, mu), _shortened(text, mu)

    def sums(way: Contrast) -> Sums:
        squares = way.similarity.pow(2).where(way.negative, way.similarity.new_zeros(()))
        return squares.sum(), way.negative.sum()

    way = replace(direction(image, text, ids, peers), precision=precision)
    squares, others = sum_over_rows(sums, [way])
    count = peers.total(others.to(squares.dtype)).clamp(min=1)
    return (peers.size * squares / count - 2 * (image * text).sum(1).mean()) / mu


def _shortened(rows: Float[Tensor, "b d"], mu: float) -> Float[Tensor, "b d"]:
    rows = wide(rows)
    # The square is limited before the root: a row of zeros has a gradient too.
    longest = rows.pow(2).sum(1, keepdim=True).clamp(min=mu)
    return rows * (mu / longest).sqrt()


@term(SpectralTerm)
def _spectral(settings: SpectralTerm, given: Given) -> TermValue:
    mu = settings.mu
    loss = spectral(*given.projected, given.rows.ids, given.peers, mu=mu, precision=given.precision)
    # The best product that is the same for every pair is 1, or as much as short rows have.
    product = min(1.0, mu)
    return TermValue(loss, lambda counts: Bounds(-2.0, (product**2 - 2 * product) / mu))
