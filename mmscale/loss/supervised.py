"""Cross-entropies of the fusion model's heads.

Each rank may have another number of them: the mean is over those of all ranks.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.loss import ClassificationTerm, MatchingTerm
from mmscale.contracts import Peers
from mmscale.errors import ConfigError
from mmscale.loss.contrast import wide
from mmscale.loss.term import Bounds, Counts, Given, TermValue, term

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


@term(MatchingTerm)
def _matching(settings: MatchingTerm, given: Given) -> TermValue:
    rows, peers = given.rows, given.peers
    logits = given.needed(rows.matching, settings, "matching logits (model.fusion)")
    targets = given.needed(rows.matching_targets, settings, "targets")

    def bounds(counts: Counts) -> Bounds:
        """Chance: the entropy of match and no match, by their shares."""
        known = targets.double()
        matches, pairs = peers.total(torch.stack([known.sum(), known.new_tensor(len(known))]))
        share = torch.stack([matches / pairs, 1 - matches / pairs])
        return Bounds(0.0, torch.special.entr(share).sum())

    return TermValue(matching(logits, targets, peers), bounds)


@term(ClassificationTerm)
def _classification(settings: ClassificationTerm, given: Given) -> TermValue:
    logits = given.needed(given.rows.class_logits, settings, "class logits (model.fusion.classes)")
    labels = given.needed(given.rows.labels, settings, "labels")
    classes = logits.shape[1]
    if given.rows.step == 0:
        _require_label(labels, given.peers)
    # An accelerator would have to be waited for: between logged updates it tells by a loss of NaN,
    # which is never trained on.
    if (given.rows.is_logged or labels.device.type == "cpu") and (labels >= classes).any():
        raise ConfigError(
            f"a label of the data is {int(labels.max())}, but must be below "
            f"model.fusion.classes={classes}; raise it"
        )
    known = labels < classes
    loss = classification(logits, labels.where(known, NO_LABEL), given.peers)
    loss = loss.where(known.all(), torch.nan)
    return TermValue(loss, lambda counts: Bounds(0.0, math.log(classes)))


def _require_label(labels: Int64[Tensor, " b"], peers: Peers) -> None:
    """What a manifest could not say before the run: that there are labels. Collective."""
    if not peers.total((labels != NO_LABEL).any().double()):
        raise ConfigError(
            "loss.terms holds classification, but no pair of the first batch has a label; pack the "
            "data with labels, or remove the term"
        )
