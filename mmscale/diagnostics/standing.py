"""How far a cell of the similarity matrix stands out of its row and its column."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Deviations of cosines below this are rounding of fp32 rows.
_RESOLUTION = 1e-8


def standing_rows(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "n d"]]:
    """Rows whose products are cosines without what each row and each column has in common.

    The product of image row i and text row j is their cosine, doubly centred and divided by the
    deviations of row i and column j, so that images with many similar captions and captions in
    everybody's neighbourhood stand out no sooner than others. Cells of pairs that do not belong
    together have mean 0 and deviation 1. A row that does not deviate becomes zeros.
    """
    sides = [rows.double() - rows.double().mean(dim=0) for rows in (image, text)]
    covariances = [rows.T @ rows / len(rows) for rows in sides]
    overall = float((covariances[0] * covariances[1]).sum().clamp(min=0.0).sqrt())
    standing = []
    for rows, others in zip(sides, reversed(covariances), strict=True):
        deviation = (rows @ others * rows).sum(dim=1, keepdim=True).clamp(min=0.0).sqrt()
        standing.append(torch.where(deviation > _RESOLUTION, rows / deviation, 0.0))
    return standing[0] * overall, standing[1]
