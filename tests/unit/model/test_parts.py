import math

import pytest
import torch

from mmscale.config.schema import HeadConfig, LogitScaleConfig
from mmscale.errors import ConfigError
from mmscale.model.heads import Head
from mmscale.model.scale import LogitScale


@pytest.mark.parametrize(("log_scale", "seen"), [(-1.0, 1.0), (1.0, math.e), (9.0, 100.0)])
def test_scale_is_clamped_where_it_is_used_and_its_gradient_is_not(log_scale, seen):
    scale = LogitScale(LogitScaleConfig(init=10.0, max=100.0))
    assert scale.log_scale.shape == (1,)
    scale.log_scale.data.fill_(log_scale)
    value = scale()
    assert value.item() == pytest.approx(seen, rel=1e-6)
    value.sum().backward()
    assert scale.log_scale.grad.item() == pytest.approx(seen, rel=1e-6)
    assert scale.log_scale.item() == log_scale


def test_scale_starts_inside_its_limits():
    with pytest.raises(ConfigError, match=r"model\.logit_scale\.init=200"):
        LogitScale(LogitScaleConfig(init=200.0, max=100.0))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_head_keeps_unit_variance_and_has_no_bias(kind):
    head = Head(512, 256, HeadConfig(kind=kind))
    assert not any("bias" in name for name, _ in head.named_parameters())
    assert head(torch.randn(300, 512)).shape == (300, 256)
    if kind == "linear":
        assert head(torch.randn(300, 512)).std().item() == pytest.approx(1, abs=0.05)


def test_standardisation_is_the_identity_until_fitted():
    rows = torch.randn(50, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0]) + 7
    head = Head(6, 6, HeadConfig(standardize=50))
    torch.testing.assert_close(head.standardize(rows), rows)
    head.set_statistics(rows.double().mean(0), rows.double().std(0))
    whitened = head.standardize(rows)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(whitened[:, :5].std(0), torch.ones(5))
    assert whitened[:, 5].abs().max() < 1e-5
    assert {"standardize.mean", "standardize.std"} <= set(head.state_dict())
    assert not any("standardize" in name for name, _ in head.named_parameters())


def test_head_names_the_true_width():
    with pytest.raises(ConfigError, match=r"width 5 .* made for 6"):
        Head(6, 4, HeadConfig())(torch.zeros(2, 5))
