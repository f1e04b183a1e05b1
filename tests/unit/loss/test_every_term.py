"""What holds for every kind of term: gradients, extremes, and what order cannot change."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.contracts import Embeddings
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import (
    IDS,
    KINDS,
    TERMS,
    WITH_BANK,
    leaves,
    loss,
    made_up,
    of_rows,
    value_and_gradients,
)

CASES = [(name, False) for name in TERMS] + [(name, True) for name in WITH_BANK]
SIZES = ([0], [0, 1], [5, 5], [3, 3, 3, 3], [4, 1, 2, 3], [1, 1, 2, 2])


def test_every_kind_has_a_case():
    assert {name.split(" ")[0] for name in TERMS} == set(KINDS)


@pytest.mark.parametrize(("name", "with_bank"), CASES)
def test_the_gradient_of_every_term_passes_gradcheck_in_float64(name, with_bank):
    ids = IDS[:6]
    leaf = leaves(ids)
    # The opinion of the momentum encoders takes the scale, and is no function to differentiate.
    fixed = {"scale"} if name == "distillation" else set()
    names = [key for key in leaf if key not in fixed]

    def f(*values):
        now = leaf | dict(zip(names, values, strict=True))
        return loss(name, made_up(now, ids, 1, with_bank), Alone())

    inputs = [leaf[key].clone().requires_grad_() for key in names]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize(("name", "with_bank"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_term_is_finite_at_the_largest_scale(name, with_bank, dtype):
    """One row, two, all of one id, in half precision and at scale 100: loss and gradient finite."""
    for ids in map(torch.tensor, SIZES):
        leaf = leaves(ids, dtype=dtype)
        leaf["scale"] = torch.full_like(leaf["scale"], 100.0)
        # Pairs that agree and pairs that are opposite: logits from -100 to 100.
        sign = 1 - 2 * (torch.arange(len(ids)) % 2)
        leaf["text"] = leaf["image"] * sign.to(dtype)[:, None]
        value, gradients = value_and_gradients(
            name, leaf, lambda leaf, ids=ids: made_up(leaf, ids, 1, with_bank), Alone()
        )
        assert value.dtype == torch.float32
        assert value.isfinite()
        for key, gradient in gradients.items():
            assert gradient.isfinite().all(), (key, ids)


@pytest.mark.parametrize("name", WITH_BANK)
def test_every_term_is_finite_where_the_queue_holds_only_positives(name):
    ids = torch.tensor([9, 9, 9])
    leaf = leaves(ids)

    def of(leaf):
        rows = made_up(leaf, ids, 1, with_bank=True)
        return replace(rows, bank=replace(rows.bank, ids=torch.full((7,), 9)))

    value, gradients = value_and_gradients(name, leaf, of, Alone())
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", TERMS)
def test_rows_on_one_point_have_a_finite_gradient(name):
    """A collapsed batch is what several of these are there to mend."""
    leaf = leaves(IDS, dtype=torch.float32)
    leaf["image"] = leaf["image"][:1].repeat(len(IDS), 1)
    leaf["text"] = leaf["image"].clone()
    value, gradients = value_and_gradients(name, leaf, lambda leaf: made_up(leaf, IDS), Alone())
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def rearranged(rows, order, relabel):
    """The same pairs in another order, their images under other numbers."""

    def put(value):
        if value is None:
            return None
        if isinstance(value, Embeddings):
            return Embeddings(put(value.raw), put(value.projected), put(value.unit))
        return value[order]

    names = ("image", "text", "labels", "momentum_image", "momentum_text")
    names += ("matching", "matching_targets", "class_logits")
    bank = rows.bank and replace(
        rows.bank, ids=rows.bank.ids.where(rows.bank.ids < 0, relabel(rows.bank.ids))
    )
    return replace(
        rows,
        **{name: put(getattr(rows, name)) for name in names},
        ids=relabel(rows.ids[order]),
        bank=bank,
        prototypes=tuple(replace(one, cluster=put(one.cluster)) for one in rows.prototypes),
        teachers=of_rows(rows.teachers, put),
    )


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=2, max_size=7),
    seed=st.integers(0, 99),
    factor=st.sampled_from([1, 3, 1_000_003]),
    data=st.data(),
)
def test_order_of_rows_and_numbers_of_images_do_not_matter(name, ids, seed, factor, data):
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    ids = torch.tensor(ids)
    rows = made_up(leaves(ids, seed), ids, seed + 1, with_bank=name in WITH_BANK)
    # One to one, and not monotone.
    other = rearranged(rows, order, lambda ids: (97 - ids) * factor)
    wanted = loss(name, rows, Alone()).item()
    assert loss(name, other, Alone()).item() == pytest.approx(wanted, rel=1e-10, abs=1e-10)
