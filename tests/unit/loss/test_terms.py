"""Terms and their settings: one of each, and a term sees what its settings say it needs."""

from dataclasses import replace

import pytest

from mmscale.config.loss import TERMS, HingeTerm, NTXentTerm
from mmscale.config.values import whole_steps
from mmscale.loss.mining import Mining
from mmscale.loss.term import Given, TermValue, compute, term, terms
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import IDS, leaves, made_up
from tests.unit.loss.cases import term as settings_of

MINING = Mining("hard", 0.3, 1.0)


def at(ramp):
    return ramp.at(1, whole_steps)


def test_each_class_of_settings_has_exactly_one_term():
    assert terms().keys() == set(TERMS.values())
    with pytest.raises(ValueError, match="HingeTerm has a term already"):
        term(HingeTerm)(lambda settings, given: None)


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_looks_at_the_queue_and_at_mining_only_where_it_needs_them(kind):
    rows, needs = made_up(leaves(IDS), IDS, with_bank=True), TERMS[kind].needs

    def loss(with_bank, mining):
        given = Given(rows if with_bank else replace(rows, bank=None), Alone(), at, mining)
        return compute(settings_of(kind), given).loss.item()

    plain = loss(False, None)
    assert (loss(True, None) != plain) == needs.queue
    assert (loss(False, MINING) != plain) == needs.mining


def test_what_a_term_does_not_need_is_kept_from_it(monkeypatch):
    seen = []

    def spy(settings, given):
        seen.append(given)
        return TermValue(given.rows.scale.sum())

    monkeypatch.setitem(terms(), NTXentTerm, spy)
    monkeypatch.setitem(terms(), HingeTerm, spy)
    rows = made_up(leaves(IDS), IDS, with_bank=True)
    for kind in ("ntxent", "hinge"):
        compute(settings_of(kind), Given(rows, Alone(), at, MINING))
    assert [(one.rows.bank is None, one.mining) for one in seen] == [(True, None), (False, None)]
