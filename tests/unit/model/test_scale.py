"""The inverse temperature: learnt, fixed, scheduled, fitted to the size of the data."""

import pytest
import torch
from torch import nn

from mmscale.config.model import LogitScaleConfig, ModelConfig
from mmscale.config.values import Duration, Ramp
from mmscale.errors import ConfigError
from mmscale.model.scale import LogitScale, take_scale, with_scale_fitted


def scale(**settings):
    return LogitScale(LogitScaleConfig.model_validate(settings))


def test_learnt_it_is_clamped_where_it_is_used_and_the_gradient_passes():
    module = scale(init=10.0, max=20.0)
    assert module().item() == pytest.approx(10)
    with torch.no_grad():
        module.log_scale.fill_(9.0)
    module().backward()
    assert module().item() == pytest.approx(20)
    assert module.log_scale.grad.item() == pytest.approx(20)


def test_the_bound_of_a_whole_model_is_its_own_first_scale_where_that_is_greater():
    for own, bound in ((117.3, 117.3), (20.0, 100.0)):
        module = LogitScale(LogitScaleConfig(), of_whole=True)
        take_scale(module, torch.tensor(own).log(), None, "its weights")
        assert module().item() == pytest.approx(own, rel=1e-6)
        assert module.limit() == pytest.approx(bound, rel=1e-6)
        with torch.no_grad():
            module.log_scale.fill_(9.0)
        module().backward()
        assert module().item() == pytest.approx(bound, rel=1e-6)
        assert module.log_scale.grad.item() == pytest.approx(bound, rel=1e-6)
        again = LogitScale(LogitScaleConfig(), of_whole=True)
        again.load_state_dict(module.state_dict())
        assert again.limit() == module.limit()


def test_a_bound_of_the_user_s_own_cuts_no_scale_off():
    module = LogitScale(LogitScaleConfig(max=100.0), of_whole=True)
    assert "log_bound" not in module.state_dict()
    with pytest.raises(ConfigError, match=r"117\.3, above model\.logit_scale\.max=100, .* raise"):
        take_scale(module, torch.tensor(117.3).log(), None, "its weights")
    take_scale(LogitScale(LogitScaleConfig(max=120.0)), torch.tensor(117.3).log(), None, "x")


def test_fixed_it_has_no_parameter_and_the_same_place_in_a_checkpoint():
    fixed, learnt = scale(learn=False), scale()
    assert not list(fixed.parameters())
    assert fixed.state_dict().keys() == learnt.state_dict().keys()
    assert fixed().item() == pytest.approx(1 / 0.07)


def test_a_course_moves_it_by_the_run_s_own_length():
    module = scale(course={"from": 10, "to": 30, "over": "2 epochs"})
    module.follow(lambda duration: duration.steps(5, 8))
    found = []
    for step in (0, 5, 10, 99):
        module.begin(step)
        found.append(module().item())
    assert found == pytest.approx([10, 20, 30, 30], rel=1e-5)
    assert not list(module.parameters())


def test_a_bias_is_there_only_where_it_is_wanted():
    assert scale()("bias") is None
    module = scale(bias=-10.0)
    assert module("bias").item() == -10
    assert isinstance(module.bias, nn.Parameter)
    assert module("bias") is not module.bias


def test_small_sets_start_at_0_8_of_the_temperature():
    wanted = ModelConfig(logit_scale=LogitScaleConfig(init=20.0, by_data_size=True))
    assert with_scale_fitted(wanted, 999).logit_scale.init == pytest.approx(25)
    assert with_scale_fitted(wanted, 1000) is wanted
    off = ModelConfig(logit_scale=LogitScaleConfig(init=20.0))
    assert with_scale_fitted(off, 10) is off
    course = Ramp(10, 90, Duration(1, "epochs"))
    settings = LogitScaleConfig(course=course, by_data_size=True)
    fitted = with_scale_fitted(ModelConfig(logit_scale=settings), 10).logit_scale.course
    assert (fitted.first, fitted.last) == (12.5, 100)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": 200.0}, r"model\.logit_scale\.init=200"),
        ({"init": 0.5}, r"model\.logit_scale\.init=0\.5"),
        ({"course": {"from": 5, "to": 200, "over": "1 epochs"}}, r"logit_scale\.course\.to=200"),
    ],
)
def test_values_outside_the_limits(settings, said):
    with pytest.raises(ConfigError, match=said):
        scale(**settings)
