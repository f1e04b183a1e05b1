"""Contrastive terms at the first dimensions of the embeddings, so that they may be cut later."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from mmscale.config.loss import MatryoshkaTerm
from mmscale.contracts import Bank, Embeddings
from mmscale.errors import ConfigError
from mmscale.loss.contrast import wide
from mmscale.loss.term import Bounds, Counts, Given, TermValue, compute, term


def cut(given: Given, width: int) -> Given:
    """What a term is given of embeddings of which only the first `width` dimensions are kept.

    Unit rows are cut and made unit rows again, which is what the heads' outputs give, cut before.
    """
    rows, bank = given.rows, given.rows.bank
    if bank is not None:
        bank = Bank(F.normalize(bank.image[:, :width]), F.normalize(bank.text[:, :width]), bank.ids)
    image, text = _cut(rows.image, width), _cut(rows.text, width)
    return replace(given, rows=replace(rows, image=image, text=text, bank=bank))


@term(MatryoshkaTerm)
def _matryoshka(settings: MatryoshkaTerm, given: Given) -> TermValue:
    """Sum over widths m of w_m times the term at m.

    Source: Kusupati et al. 2022, "Matryoshka Representation Learning" (arXiv 2205.13147), equation
        1; its sum over widths holds the whole one too, which here is a term of its own.
    """
    whole, inner = given.rows.image.unit.shape[1], settings.of
    if settings.widths[-1] >= whole:
        raise ConfigError(
            f"loss.terms holds matryoshka with a width of {settings.widths[-1]}, and the "
            f"embeddings are {whole} wide; give widths below that."
        )
    weights = settings.weights or (1.0,) * len(settings.widths)
    values = {width: compute(inner, cut(given, width)) for width in settings.widths}
    found = [(w, m, value) for w, (m, value) in zip(weights, values.items(), strict=True) if value]
    loss = sum((w * value.loss for w, _, value in found), start=0 * given.rows.scale.sum())

    def bounds(counts: Counts) -> Bounds:
        if not inner.needs.queue:
            alone = len(counts) - counts.positives
            counts = replace(counts, negatives=alone, remembered=0 * counts.remembered)
        each = [(w, value.bounds(replace(counts, width=m))) for w, m, value in found]
        floors = [None if b.floor is None else w * b.floor for w, b in each]
        chances = [None if b.chance is None else w * b.chance for w, b in each]
        return Bounds(_sum(floors), _sum(chances))

    return TermValue(loss, bounds)


def _cut(rows: Embeddings, width: int) -> Embeddings:
    unit = F.normalize(wide(rows.unit[:, :width]), dim=1)
    return Embeddings(rows.raw, rows.projected[:, :width], unit)


def _sum(values: list[Any]) -> Any:
    """None where one of them is."""
    return None if any(value is None for value in values) else sum(values)
