"""The weighted sum: ramps, names, what is logged beside a term, what is missing."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mmscale.config.load import validate
from mmscale.config.loss import OBJECTIVES
from mmscale.errors import ConfigError
from mmscale.loss.objective import Objective
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import IDS, leaves, made_up


def objective(*terms, **sections):
    return Objective(
        validate({"data": {"train": "unused"}, "loss": {"terms": list(terms)}, **sections}), Alone()
    )


def rows(**changes):
    return replace(made_up(leaves(IDS), IDS), **changes)


def test_total_is_the_weighted_sum_and_terms_are_told_alone():
    first, second = {"kind": "infonce", "weight": 0.5}, {"kind": "alignment", "weight": 2}
    out = objective(first, second)(rows())
    terms = out.terms
    assert out.total.item() == pytest.approx(
        0.5 * terms["infonce"].item() + 2 * terms["alignment"].item()
    )
    assert set(terms) == {
        "infonce",
        "infonce_floor",
        "infonce_chance",
        "alignment",
        "alignment_floor",
        "alignment_chance",
    }
    assert terms["infonce_floor"] <= terms["infonce"]
    assert not any(value.requires_grad for value in terms.values())


class Counting(Alone):
    """Peers that count what is asked of them."""

    def __init__(self):
        self.calls = Counter()

    def columns(self, rows):
        self.calls["columns"] += 1
        return rows

    def total(self, value):
        self.calls["total"] += 1
        return value


def test_bounds_are_made_on_logged_updates_alone_and_no_exchange_for_them_on_others():
    terms = [{"kind": kind} for kind in ("regression", "matching", "alignment")]
    config = validate({"data": {"train": "unused"}, "loss": {"terms": terms}})
    calls, outs = {}, {}
    for is_logged in (True, False):
        peers = Counting()
        outs[is_logged] = Objective(config, peers)(rows(is_logged=is_logged))
        calls[is_logged] = peers.calls
    assert outs[False].terms.keys() == {"regression", "matching", "alignment"}
    assert {"matching_chance", "alignment_floor"} < outs[True].terms.keys()
    assert outs[False].total == outs[True].total
    # Of the loss itself: how many pairs all ranks judge.
    assert calls[False] == {"total": 1}
    # Ids, and how many of the pairs match.
    assert calls[True] == {"total": 2, "columns": 1}


def test_two_terms_of_a_kind_keep_their_names_apart():
    out = objective({"kind": "hinge"}, {"kind": "hinge", "margin": 0.4})(rows())
    assert out.terms["hinge_2"] > out.terms["hinge"]
    assert out.total.item() == pytest.approx(
        (out.terms["hinge"] + out.terms["hinge_2"]).item(), rel=1e-12
    )


def test_a_weight_follows_its_ramp_and_at_zero_the_term_is_not_computed():
    ramp = {"from": 0, "to": 1, "over": "4 steps", "start": "2 steps"}
    sums = objective({"kind": "infonce"}, {"kind": "alignment", "weight": ramp})
    early, midway = sums(rows(step=2)), sums(rows(step=3))
    assert "alignment" not in early.terms
    assert midway.terms["alignment_weight"].item() == 0.25
    assert midway.total.item() == pytest.approx(
        midway.terms["infonce"].item() + 0.25 * midway.terms["alignment"].item()
    )


def test_prototypes_wait_for_the_first_clusters():
    sums = objective({"kind": "infonce"}, {"kind": "prototypes"})
    first, later = sums(rows(prototypes=())), sums(rows())
    assert "prototypes" not in first.terms
    assert first.total.item() == first.terms["infonce"].item()
    assert later.terms["prototypes"] > 0


def test_where_every_weight_is_zero_the_gradient_is_too():
    leaf = {name: value.requires_grad_() for name, value in leaves(IDS).items()}
    out = objective({"kind": "infonce", "weight": 0})(made_up(leaf, IDS))
    out.total.backward()
    assert not leaf["image"].grad.any()
    assert not leaf["text"].grad.any()


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("distillation", {"momentum_text": None}),
        ("prototypes", {"prototypes": None}),
        ("matching", {"matching": None}),
        ("classification", {"class_logits": None}),
        ("classification", {"labels": None}),
        ("siglip", {"bias": None}),
    ],
)
def test_a_term_whose_input_is_missing_is_an_error_that_names_it(kind, missing):
    needs = {"model": {"fusion": {"classes": 3}}}
    with pytest.raises(ConfigError, match=kind):
        objective({"kind": kind}, **needs)(rows(**missing))


def test_classification_refuses_missing_and_too_large_labels():
    needs = {"model": {"fusion": {"classes": 3}}}
    sums = objective({"kind": "classification"}, **needs)
    none = torch.full_like(IDS, -1)
    with pytest.raises(ConfigError, match="no pair of the first batch has a label"):
        sums(rows(step=0, labels=none))
    assert sums(rows(step=1, labels=none)).terms["classification"].item() == 0
    with pytest.raises(ConfigError, match=r"model\.fusion\.classes=3"):
        sums(rows(labels=torch.full_like(IDS, 3)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_preset_gives_a_finite_total(name):
    settings = {"loss": {"preset": name}, "model": {"fusion": {"classes": 3}}}
    config = validate({"data": {"train": "unused"}, **settings})
    sums = Objective(config, Alone(), steps_of=lambda duration: 5)
    for step in (0, 9):
        out = sums(rows(step=step))
        assert out.total.isfinite()
        assert {term.kind for term in config.loss.terms} >= set(out.terms) & {
            term["kind"] for term in OBJECTIVES[name]
        }
