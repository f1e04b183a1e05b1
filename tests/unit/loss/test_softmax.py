"""InfoNCE against the paper's formula as slow loops, figures of live libraries, identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.dist.peers import Alone
from mmscale.loss.softmax import chance, floor, infonce

IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])


def fixture_rows():
    """Eight pairs of six dimensions, without a random number."""
    i = torch.arange(8, dtype=torch.float64)[:, None]
    j = torch.arange(6, dtype=torch.float64)[None, :]
    x = torch.sin(0.7 * i + 0.3 * j + 0.1 * i * j)
    y = torch.cos(0.5 * i + 0.2 * j) + 0.5 * x
    return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)


def scale_of(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def slow_loops(x, y, ids, scale):
    """Khosla et al. 2020, equation 2, across modalities and in both directions."""
    total = 0.0
    for rows, columns in ((x, y), (y, x)):
        for i in range(len(rows)):
            logits = [scale * float(rows[i] @ columns[j]) for j in range(len(columns))]
            everything = math.log(sum(math.exp(value) for value in logits))
            positives = [logits[j] for j in range(len(ids)) if ids[j] == ids[i]]
            total += sum(everything - value for value in positives) / len(positives)
    return total / (2 * len(x))


def test_distinct_ids_give_clips_loss():
    """Frozen from open_clip 3.3's ClipLoss on the same rows."""
    x, y = fixture_rows()
    loss = infonce(x, y, torch.arange(8), scale_of(1 / 0.07), Alone())
    assert loss.item() == pytest.approx(0.766957136148, abs=1e-11)


def test_equal_ids_give_supcon_across_modalities():
    """Frozen from pytorch-metric-learning 2.9's SupConLoss with its mean reducer."""
    x, y = fixture_rows()
    loss = infonce(x, y, IDS, scale_of(1 / 0.07), Alone())
    assert loss.item() == pytest.approx(2.544463819223, abs=1e-11)


def test_agrees_with_open_clip_live():
    from open_clip.loss import ClipLoss

    x, y = fixture_rows()
    scale = scale_of(20.0)
    assert infonce(x, y, torch.arange(8), scale, Alone()).item() == pytest.approx(
        ClipLoss()(x, y, scale[0]).item(), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=7),
    seed=st.integers(0, 99),
    scale=st.floats(1, 50),
)
def test_slow_loops(ids, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.nn.functional.normalize(
            torch.randn(len(ids), 5, generator=generator, dtype=torch.float64), dim=1
        )
        for _ in range(2)
    )
    loss = infonce(x, y, torch.tensor(ids), scale_of(scale), Alone())
    assert loss.item() == pytest.approx(slow_loops(x, y, ids, scale), rel=1e-10, abs=1e-10)


def test_rows_may_be_permuted_and_ids_relabelled():
    x, y = fixture_rows()
    order = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    wanted = infonce(x, y, IDS, scale_of(14), Alone())
    permuted = infonce(x[order], y[order], IDS[order] * 1_000_003 + 7, scale_of(14), Alone())
    assert permuted.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_gradient_in_float64():
    x, y = (rows[:4].clone().requires_grad_() for rows in fixture_rows())
    scale = scale_of(9.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, s: infonce(a, b, IDS[:4], s, Alone()), (x, y, scale)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[0], [5, 5], [1, 1, 1, 1], [0, 1, 2, 3]])
def test_finite_at_the_largest_scale(dtype, ids):
    x, y = (rows[: len(ids)].to(dtype).requires_grad_() for rows in fixture_rows())
    loss = infonce(x, y, torch.tensor(ids), torch.tensor([100.0]), Alone())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_a_model_that_tells_nothing_apart_is_at_chance_and_a_perfect_one_at_its_floor():
    one = torch.ones(8, 1, dtype=torch.float64)
    assert infonce(one, one, IDS, scale_of(30), Alone()).item() == pytest.approx(chance(IDS))
    own = torch.nn.functional.one_hot(IDS).double()
    assert infonce(own, own, IDS, scale_of(1e4), Alone()).item() == pytest.approx(floor(IDS))
    assert floor(IDS) == pytest.approx((2 * math.log(2) + 3 * math.log(3)) / 8)
