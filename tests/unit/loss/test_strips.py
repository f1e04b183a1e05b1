"""Losses in strips of rows: what they are from all rows at once, and no table of rows and columns.

Batches of these sizes take one strip; smaller strips are what is tested against it.
"""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.config.loss import TERMS as SETTINGS
from mmscale.loss import strips
from mmscale.loss.contrast import PairRows, directions
from mmscale.loss.strips import sum_over_rows
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import IDS, MINING, TERMS, WITH_BANK, leaves, made_up, term
from tests.unit.loss.cases import value_and_gradients as found_in

IN_STRIPS = [name for name in TERMS if term(name).contrasts_in(mined=name in MINING) == "strips"]
CASES = [(name, False) for name in IN_STRIPS]
CASES += [(name, True) for name in IN_STRIPS if name in WITH_BANK]
ROWS = 60


def test_these_are_all_that_contrast_but_infonce_in_tiles():
    kinds = {name.split(" ")[0] for name in IN_STRIPS}
    gathering = {kind for kind in SETTINGS if SETTINGS[kind].needs.gathers}
    assert kinds == gathering | {"distillation", "teacher", "anchor"}


@pytest.mark.parametrize(("name", "with_bank"), CASES)
@pytest.mark.parametrize("rows_of_a_strip", [1, 3])
def test_strips_add_up_to_the_whole(name, with_bank, rows_of_a_strip, monkeypatch):
    def found():
        return found_in(name, leaves(IDS), lambda leaf: made_up(leaf, IDS, 1, with_bank), Alone())

    whole, whole_gradients = found()
    # Columns of both modalities, or of one and the bank.
    monkeypatch.setattr(strips, "CPU_LOGITS", 16 * rows_of_a_strip)
    value, gradients = found()
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, whole_gradients, rtol=1e-11, atol=1e-12)


class Largest(TorchDispatchMode):
    """Most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("name", "with_bank"), CASES)
def test_no_tensor_has_a_number_for_each_row_and_column(name, with_bank, monkeypatch):
    ids = torch.arange(ROWS) // 2

    def largest():
        with Largest() as seen:
            found_in(name, leaves(ids), lambda leaf: made_up(leaf, ids, 1, with_bank), Alone())
        return seen.elements

    assert largest() >= ROWS * ROWS
    limit = 1000
    monkeypatch.setattr(strips, "CPU_LOGITS", limit)
    assert largest() <= limit


def test_what_is_kept_for_the_backward_is_as_large_as_rows_and_columns(monkeypatch):
    monkeypatch.setattr(strips, "CPU_LOGITS", 8 * ROWS)
    unit = normalize(torch.randn(2, ROWS, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    image, text = unit[0].clone().requires_grad_(), unit[1].clone().requires_grad_()
    way, _ = directions(PairRows(image, text, torch.arange(ROWS), Alone()))
    (total,) = sum_over_rows(lambda way: (way.similarity.exp().sum(),), [way])
    kept = [g for g in total.grad_fn.gradients if g is not None]
    assert sum(g.numel() for g in kept) == image.numel() + text.numel()
    total.backward(retain_graph=True)
    first = image.grad.clone()
    total.backward()
    torch.testing.assert_close(image.grad, 2 * first)


def test_a_value_without_a_gradient_needs_none(monkeypatch):
    monkeypatch.setattr(strips, "CPU_LOGITS", 16)
    leaf = leaves(IDS)
    rows = made_up(leaf, IDS)
    way, _ = directions(PairRows(rows.image.unit, rows.text.unit, IDS, Alone()))
    total, count = sum_over_rows(lambda way: (way.similarity.sum(), way.negative.sum()), [way])
    assert not total.requires_grad
    torch.testing.assert_close(total, (rows.image.unit @ rows.text.unit.T).sum())
    assert count == (IDS[:, None] != IDS).sum()
