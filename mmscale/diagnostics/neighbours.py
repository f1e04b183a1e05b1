"""Who is near whom: items that are everybody's neighbour, and items that are there twice."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

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
