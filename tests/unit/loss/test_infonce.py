"""InfoNCE in tiles against the dense one: values, gradients, extremes, and what it holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.contracts import Bank
from mmscale.loss import tiles
from mmscale.loss.contrast import PairRows
from mmscale.loss.infonce import infonce, infonce_in_strips
from mmscale.parallel.peers import Alone

SIDE = 8
KEPT_TILES = 2


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that a few rows need many tiles, of which only the first are kept."""
    monkeypatch.setattr(tiles, "CPU_SIDE", SIDE)
    monkeypatch.setattr(tiles, "KEPT_BYTES", KEPT_TILES * SIDE * SIDE * 8)


def unit_rows(count, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)).to(dtype)


def scale_of(value, dtype=torch.float64):
    return torch.tensor([value], dtype=dtype)


def value_and_gradients(loss, image, text, ids, scale, bank=None):
    inputs = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    value = loss(PairRows(*inputs[:2], ids, Alone(), bank), inputs[2])
    # Twice: what was kept for the first backward is gone at the second.
    value.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    value.backward()
    for once, again in zip(first, inputs, strict=True):
        torch.testing.assert_close(once, again.grad, rtol=1e-10, atol=1e-12)
    return value.detach(), first


def assert_same(image, text, ids, scale, bank=None):
    case = image, text, ids, scale, bank
    wanted, wanted_gradients = value_and_gradients(infonce_in_strips, *case)
    value, gradients = value_and_gradients(infonce, *case)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    # A logit's rounding is eps s, and so its probability's; a gradient is s times that.
    rounding = 1e-12 + 4 * torch.finfo(torch.float64).eps * scale.item() ** 2
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-11, atol=rounding)


@st.composite
def problems(draw):
    """Rows around the edges of tiles; ids all different, all equal or mixed; banks half filled."""
    count = draw(st.sampled_from([1, 2, 7, 8, 9, 16, 17, 30]))
    kinds = draw(st.sampled_from([1, 3, count, 1000]))
    ids = torch.tensor(draw(st.lists(st.integers(0, kinds), min_size=count, max_size=count)))
    seed, width = draw(st.integers(0, 99)), draw(st.integers(1, 12))
    image, text = unit_rows(count, width, seed), unit_rows(count, width, seed + 100)
    scale = scale_of(draw(st.sampled_from([0.5, 14.3, 49.0, 100.0, 3000.0])))
    size = draw(st.sampled_from([0, 5, 8, 21]))
    slots = torch.tensor(draw(st.lists(st.integers(-1, kinds), min_size=size, max_size=size)))
    slots = slots.to(torch.int64)
    bank = Bank(unit_rows(size, width, seed + 200), unit_rows(size, width, seed + 300), slots)
    return image, text, ids, scale, bank if draw(st.booleans()) else None


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_tiled_infonce_equals_the_dense_loss(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_SIDE", SIDE)
        patch.setattr(tiles, "KEPT_BYTES", KEPT_TILES * SIDE * SIDE * 8)
        assert_same(*problem)


def test_tiled_infonce_equals_the_dense_loss_over_the_edge_of_a_real_tile():
    count = tiles.CPU_SIDE + 3
    ids = torch.arange(count).clamp(max=count - 5)
    assert_same(unit_rows(count, 4, 0), unit_rows(count, 4, 1), ids, scale_of(30.0))


@pytest.mark.parametrize("scale", [5.0, 60.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_narrow_dtypes_differ_from_the_dense_loss_by_rounding(dtype, scale):
    image, text = unit_rows(30, 16, 0, dtype), unit_rows(30, 16, 1, dtype)
    case = image, text, torch.arange(30) // 2, scale_of(scale, torch.float32)
    wanted, wanted_gradients = value_and_gradients_once(infonce_in_strips, *case)
    value, gradients = value_and_gradients_once(infonce, *case)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == expected.dtype
        error = (gradient.double() - expected.double()).abs().max()
        assert error <= rounding * expected.double().abs().max()


def value_and_gradients_once(loss, image, text, ids, scale):
    inputs = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    value = loss(PairRows(*inputs[:2], ids, Alone()), inputs[2])
    return value.detach(), torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[0], [5, 5], [1, 1, 1, 1], [0, 1, 2, 3]])
def test_infonce_is_finite_at_the_largest_scale(dtype, ids):
    image = unit_rows(len(ids), 6, 0, dtype).requires_grad_()
    text = unit_rows(len(ids), 6, 1, dtype).requires_grad_()
    loss = infonce(PairRows(image, text, torch.tensor(ids), Alone()), torch.tensor([100.0]))
    loss.backward()
    assert loss.isfinite()
    assert image.grad.isfinite().all()
    assert text.grad.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_a_row_that_resembles_nothing_is_exact_in_fp32():
    """Its sum is e^-100 times its neighbours' highest: no one shift suits both."""
    direction = torch.zeros(20, 4)
    direction[:, 0] = 1.0
    image, text = direction.clone(), direction.clone()
    image[3] = -image[3]
    image[3, 1], text[:, 1] = 1e-3, torch.linspace(0, 1, 20)
    case = normalize(image), normalize(text), torch.arange(20), scale_of(100.0, torch.float32)
    # One shift loses this row's sum, so the other way is taken.
    assert tiles.shifted_sums(*case[:2], case[3], tiles.shift_for(*case[:2], case[3]), []) is None
    value, gradients = value_and_gradients_once(infonce, *case)
    double = [t.double() if t.dtype.is_floating_point else t for t in case]
    wanted, wanted_gradients = value_and_gradients_once(infonce_in_strips, *double)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_rows_that_are_all_alike_are_at_chance_in_fp32():
    """Every logit is the largest possible: sums are highest, their reciprocals lowest."""
    one = torch.zeros(3000, 2)
    one[:, 0] = 1.0
    image, text = one.clone().requires_grad_(), one.clone().requires_grad_()
    scale = torch.tensor([100.0], requires_grad=True)
    loss = infonce(PairRows(image, text, torch.arange(3000), Alone()), scale)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3000), abs=1e-4)
    assert scale.grad.abs().item() < 3e-5
    # Row i is pulled to its own caption and pushed from all: they are the same.
    assert image.grad.abs().max() < 1e-6


def test_a_bank_that_is_hidden_from_every_row_changes_nothing():
    image, text, ids = unit_rows(6, 5, 0), unit_rows(6, 5, 1), torch.zeros(6, dtype=torch.int64)
    hidden = Bank(unit_rows(4, 5, 2), unit_rows(4, 5, 3), torch.tensor([0, -1, 0, -1]))
    alone = value_and_gradients(infonce, image, text, ids, scale_of(9.0))
    beside = value_and_gradients(infonce, image, text, ids, scale_of(9.0), hidden)
    torch.testing.assert_close(alone, beside, rtol=1e-14, atol=1e-14)


def test_infonce_of_nan_rows_is_nan():
    image = unit_rows(5, 3, 0)
    image[2, 1] = torch.nan
    assert infonce(PairRows(image, image, torch.arange(5), Alone()), scale_of(9.0)).isnan()


def test_gradient_in_float64():
    image, text = (unit_rows(5, 4, seed).requires_grad_() for seed in (0, 1))
    bank = Bank(unit_rows(3, 4, 2), unit_rows(3, 4, 3), torch.tensor([7, -1, 0]))
    ids = torch.tensor([0, 0, 1, 2, 3])
    assert torch.autograd.gradcheck(
        lambda a, b, s: infonce(PairRows(a, b, ids, Alone(), bank), s),
        (image, text, scale_of(9.0).requires_grad_()),
    )


class Largest(TorchDispatchMode):
    """Most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.usefixtures("small_tiles")
def test_no_tensor_is_larger_than_the_rows_or_a_tile():
    count, width, size = 100, 3, 150
    image, text = (unit_rows(count, width, seed).requires_grad_() for seed in (0, 1))
    bank = Bank(unit_rows(size, width, 2), unit_rows(size, width, 3), torch.arange(-10, size - 10))

    def largest(loss):
        with Largest() as seen:
            pairs = PairRows(image, text, torch.arange(count), Alone(), bank)
            loss(pairs, scale_of(20.0)).backward()
        return seen.elements

    assert largest(infonce_in_strips) >= count * count
    # Rows of this batch and of the bank stand together where means are taken.
    assert largest(infonce) <= (count + size) * width


@pytest.mark.usefixtures("small_tiles")
def test_only_the_first_tiles_are_kept():
    image, text, scale = unit_rows(100, 3, 0), unit_rows(100, 3, 1), scale_of(20.0)
    kept = []
    tiles.shifted_sums(image, text, scale, 0.0, kept)
    assert len(kept) == KEPT_TILES
    torch.testing.assert_close(kept[1], (20 * image[:SIDE] @ text[SIDE : 2 * SIDE].T).exp())
