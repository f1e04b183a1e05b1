"""Products of rounded rows and columns: how far losses and gradients are from the exact ones."""

import pytest
import torch
from torch.nn.functional import normalize

from mmscale.config.values import whole_steps
from mmscale.errors import ConfigError
from mmscale.loss import strips, tiles
from mmscale.loss.product import product, require_precision, similarity
from mmscale.loss.term import Given, compute
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import MINING, TERMS, WITH_BANK, leaves, made_up, term

CONTRASTING = [name for name in TERMS if term(name).contrasts_in(mined=False)]
CASES = [(name, False) for name in CONTRASTING]
CASES += [(name, True) for name in CONTRASTING if name in WITH_BANK]
# Another column is picked where two are nearly alike: the value hardly changes, the gradient does.
PICKING = ("hinge", "dcl semi-hard")
IDS = torch.arange(40) // 2
# Half of a bf16's last digit, for either side of a product.
ROUNDING = 2**-8


def found(name, with_bank, precision, dtype):
    leaf = {key: value.requires_grad_() for key, value in leaves(IDS, dtype=dtype).items()}
    rows = made_up(leaf, IDS, 1, with_bank)
    given = Given(rows, Alone(), lambda ramp: ramp.at(1, whole_steps), MINING.get(name), precision)
    loss = compute(term(name), given).loss
    image, text = torch.autograd.grad(loss, (leaf["image"], leaf["text"]))
    return loss.detach().double(), torch.cat([image, text]).double()


@pytest.mark.parametrize(("name", "with_bank"), CASES)
@pytest.mark.parametrize("in_parts", [False, True])
def test_bf16_products_are_within_their_rounding(name, with_bank, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr(strips, "CPU_LOGITS", 300)
        monkeypatch.setattr(tiles, "CPU_SIDE", 8)
    exact, exact_gradient = found(name, with_bank, "fp32", torch.float32)
    value, gradient = found(name, with_bank, "bf16", torch.float32)
    assert value != exact
    # The scale is 7: no logit is further off than this, and one column's share of a row is below 1.
    assert (value - exact).abs() <= 7 * ROUNDING * max(1.0, exact.abs().item())
    if name not in PICKING:
        assert (gradient - exact_gradient).norm() <= 2e-2 * exact_gradient.norm()


@pytest.mark.parametrize("name", CONTRASTING)
def test_float64_is_left_alone(name):
    for one, other in zip(
        found(name, False, "bf16", torch.float64),
        found(name, False, "fp32", torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_sums_of_a_bf16_product_are_fp32():
    """Against the exact sum of the rounded inputs: 4,096 of them, which bf16 could not add."""
    a, b = torch.rand(3, 4096), torch.rand(4096, 2)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    torch.testing.assert_close(product(a, b, "bf16").double(), exact, rtol=1e-6, atol=0)
    assert product(a, b, "bf16").dtype == torch.float32
    assert not torch.equal(exact, a.double() @ b.double())


def test_a_cosine_is_off_by_at_most_the_rounding_of_both_rows():
    generator = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(200, 64, generator=generator), dim=1) for _ in range(2))
    error = (similarity(x, y, "bf16").double() - x.double() @ y.double().T).abs().max()
    assert 1e-5 < error <= ROUNDING


def test_tf32_is_refused_off_cuda():
    for precision in ("fp32", "bf16"):
        require_precision(precision, torch.device("cpu"))
    require_precision("tf32", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"loss\.precision=tf32 needs a CUDA device, this is mps"):
        require_precision("tf32", torch.device("mps"))
