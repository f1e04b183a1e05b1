import math

import pytest

from mmscale.config.model import LogitScaleConfig
from mmscale.errors import ConfigError
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
