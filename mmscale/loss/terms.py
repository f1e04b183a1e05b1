"""From a term of `loss.terms` to its loss: one line a kind, and what each needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmscale.config import loss as settings
from mmscale.config.loss import AnyTerm
from mmscale.config.ramp import Ramp
from mmscale.contracts import LossInput, Peers
from mmscale.errors import ConfigError
from mmscale.loss import softmax, tiled
from mmscale.loss.distillation import distillation
from mmscale.loss.hinge import hinge
from mmscale.loss.mining import Mining
from mmscale.loss.prototypes import prototypes
from mmscale.loss.sigmoid import siglip
from mmscale.loss.softmax import dcl, hn_nce
from mmscale.loss.spectral import spectral
from mmscale.loss.sphere import alignment, uniformity
from mmscale.loss.statistics import barlow, decorrelation, diversity, regression, vicreg
from mmscale.loss.supervised import NO_LABEL, classification, matching
from mmscale.loss.views import ntxent, supcon

T = TypeVar("T")


@dataclass(frozen=True)
class Computed:
    """A term over this rank's rows; `floor` where only the computation tells it."""

    loss: Float[Tensor, ""]
    floor: Float[Tensor, ""] | None = None


def compute(
    term: AnyTerm,
    rows: LossInput,
    peers: Peers,
    at: Callable[[Ramp], float],
    mining: Mining | None = None,
) -> Computed:
    """This rank's share of a term.

    Args:
        term: Its settings.
        rows: What the engine made of this rank's rows.
        peers: The ranks that contrast together.
        at: A ramp's value now.
        mining: Which negatives count, for the terms that ask (`config.needs.MINED_TERMS`).

    Raises:
        ConfigError: The run does not make what the term needs.
    """
    if isinstance(term, settings.DistillationTerm):
        momentum_image = _needed(rows.momentum_image, term, "a momentum encoder")
        momentum_text = _needed(rows.momentum_text, term, "a momentum encoder")
        units = rows.image.unit, rows.text.unit, momentum_image, momentum_text
        return Computed(
            *distillation(*units, rows.ids, rows.scale, peers, rows.bank, at(term.alpha))
        )
    return Computed(_loss(term, rows, peers, at, mining))


def _loss(
    term: AnyTerm,
    rows: LossInput,
    peers: Peers,
    at: Callable[[Ramp], float],
    mining: Mining | None,
) -> Float[Tensor, ""]:
    unit, raw = (rows.image.unit, rows.text.unit), (rows.image.projected, rows.text.projected)
    ids, bank, scale = rows.ids, rows.bank, _scale(term, rows)
    match term:
        case settings.InfoNCETerm():
            smoothing = at(term.label_smoothing)
            if not smoothing and mining is None:
                return tiled.infonce(*unit, ids, scale, peers, bank)
            return softmax.infonce(*unit, ids, scale, peers, bank, smoothing, mining)
        case settings.SigLIPTerm():
            bias = _needed(rows.bias, term, "the logits' bias (model.logit_scale.bias)")
            return siglip(*unit, ids, scale, bias, peers, bank, mining)
        case settings.DCLTerm():
            return dcl(*unit, ids, scale, peers, bank, mining)
        case settings.HardNegativeTerm():
            return hn_nce(*unit, ids, scale, peers, bank, term.alpha, at(term.beta))
        case settings.NTXentTerm():
            return ntxent(*unit, ids, scale, peers)
        case settings.SupConTerm():
            return supcon(*unit, ids, scale, peers, term.base_temperature)
        case settings.HingeTerm():
            hardness = at(term.hardness)
            return hinge(*unit, ids, peers, bank, term.margin, hardness, term.semi_hard)
        case settings.SpectralTerm():
            return spectral(*raw, ids, peers, term.mu)
        case settings.VICRegTerm():
            return vicreg(*raw, peers, term.invariance, term.variance, term.covariance)
        case settings.BarlowTerm():
            return barlow(*raw, peers, term.redundancy)
        case settings.DecorrelationTerm():
            return decorrelation(*raw, peers)
        case settings.DiversityTerm():
            return diversity(*unit, peers, term.floor)
        case settings.RegressionTerm():
            return regression(*raw)
        case settings.AlignmentTerm():
            return alignment(*unit)
        case settings.UniformityTerm():
            return uniformity(*unit, ids, peers, term.t)
        case settings.PrototypesTerm():
            return prototypes(*unit, _needed(rows.prototypes, term, "clusters"), peers)
        case settings.MatchingTerm():
            logits = _needed(rows.matching, term, "matching logits (model.fusion)")
            return matching(logits, _needed(rows.matching_targets, term, "targets"), peers)
        case settings.ClassificationTerm():
            logits = _needed(rows.class_logits, term, "class logits (model.fusion.classes)")
            return classification(logits, _labels(rows, term, logits.shape[1], peers), peers)
    raise AssertionError(f"no loss for {term!r}")


def _scale(term: AnyTerm, rows: LossInput) -> Float[Tensor, "1"]:
    own = getattr(term, "temperature", None)
    return rows.scale if own is None else torch.full_like(rows.scale, 1 / own)


def _needed(value: T | None, term: AnyTerm, what: str) -> T:
    if value is None:
        raise ConfigError(
            f"loss.terms holds {term.kind}, but this run makes no {what}; remove the term"
        )
    return value


def _labels(rows: LossInput, term: AnyTerm, num_classes: int, peers: Peers) -> Any:
    """The rows' labels, checked where a loss could not say what is wrong. Collective."""
    labels = _needed(rows.labels, term, "labels")
    facts = torch.stack([(labels != NO_LABEL).any(), (labels >= num_classes).any()])
    some, beyond = (peers.total(facts.double()) > 0).tolist()
    if rows.step == 0 and not some:
        raise ConfigError(
            "loss.terms holds classification, but no pair of the first batch has a label; pack the "
            "data with labels, or remove the term"
        )
    if beyond:
        raise ConfigError(
            f"a label of the data is not below model.fusion.classes={num_classes}; raise it"
        )
    return labels
