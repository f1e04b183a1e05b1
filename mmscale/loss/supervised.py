"""Cross-entropies of the fusion model's heads.

Each rank may have another number of them: the mean is over those of all ranks.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Peers
from mmscale.loss.contrast import wide

NO_LABEL = -1


def matching(
    logits: Float[Tensor, "m 2"], targets: Int64[Tensor, " m"], peers: Peers
) -> Float[Tensor, ""]:
    """Cross-entropy of match (1) or no match (0), over the pairs of all ranks.

    With one match to two others it is ln 3 - 2/3 ln 2 for a head that has learnt nothing.

    Source: Li et al. 2021, "Align before Fuse" (arXiv 2107.07651), equation 2.
    """
    return classification(logits, targets, peers)


def classification(
    logits: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"], peers: Peers
) -> Float[Tensor, ""]:
    """Cross-entropy over the rows of all ranks that have a label; 0 where none has."""
    known = labels != NO_LABEL
    losses = F.cross_entropy(wide(logits), labels, ignore_index=NO_LABEL, reduction="sum")
    count = peers.total(known.sum().to(losses.dtype)).clamp(min=1)
    return peers.size * losses / count
