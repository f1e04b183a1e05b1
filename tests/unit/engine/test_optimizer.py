"""Groups of parameters and optimizers by name, against closed forms."""

import pytest
import timm
import torch
from torch import nn

from mmscale.config.training import OptimConfig
from mmscale.engine.optimizer import KNOWN, WHOLE, optimizer_kind, parameter_groups, set_rates
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.model.freezing import layer_scales
from mmscale.model.timm_vision import TimmTower
from tests.ranks.tiny import tiny_config


def _optim(**settings) -> OptimConfig:
    return OptimConfig.model_validate(settings)


def _rates(model: nn.Module, groups) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def test_a_timm_towers_layers_are_timms():
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3)
    factors = layer_scales(TimmTower(trunk, 224), 0.5)
    assert factors["trunk.norm.weight"] == 1
    assert factors["trunk.blocks.2.attn.qkv.weight"] == 1
    assert factors["trunk.blocks.0.attn.qkv.weight"] == 0.5**2
    assert factors["trunk.patch_embed.proj.weight"] == 0.5**3
    assert factors.keys() == {f"trunk.{name}" for name, _ in trunk.named_parameters()}


def test_every_parameter_has_the_rate_of_its_component_and_depth():
    """Rate = lr x the component's scale x decay ** depth; norms, biases and scale never decay."""
    config = tiny_config(
        model__text__options={
            **{"width": 32, "heads": 2, "layers": 3, "context_length": 16, "vocab_size": 99}
        },
        optim__lr_scale={"vision": 0.1, "text": 0.5, "scale": 2.0},
        optim__weight_decay=0.2,
        optim__weight_decay_scale={"head": 0.5},
        optim__layer_decay={"text": 0.5},
    )
    model, _ = build_model(config.model, None, 0)
    groups = parameter_groups(model, config.optim)
    rates = _rates(model, groups)
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    lr = config.optim.lr
    blocks = model.text.block_parameters()
    assert len(blocks) == 4, "what comes before the blocks, and three of them"
    for depth, block in enumerate(blocks):
        for name in block:
            if f"text.trunk.{name}" in rates:
                assert rates[f"text.trunk.{name}"][0] == pytest.approx(
                    lr * 0.5 * 0.5 ** (3 - depth)
                )
    for name, (rate, decay) in rates.items():
        parameter = model.get_parameter(name)
        if name.startswith("vision."):
            assert rate == pytest.approx(lr * 0.1)
        if name.startswith("head."):
            assert rate == lr
        if name.startswith("scale."):
            assert rate == lr * 2
        wanted = 0.0 if parameter.ndim <= 1 or name.startswith("scale.") else 0.2
        assert decay == (wanted / 2 if name.startswith("head.") else wanted)


def test_without_layer_decay_a_component_is_one_group_or_two():
    model, _ = build_model(tiny_config().model, None, 0)
    names = [group["name"] for group in parameter_groups(model, _optim())]
    assert sorted(names) == [
        "head.decay",
        "scale.no_decay",
        "text.decay",
        "text.no_decay",
        "vision.decay",
        "vision.no_decay",
    ]


def test_a_rate_is_base_times_factor_times_balance():
    groups = [{"base_lr": 0.5, "balance": 1.0}, {"base_lr": 0.5, "balance": 0.25}]
    set_rates(groups, 0.1)
    assert [group["lr"] for group in groups] == [0.05, 0.0125]


def _train(optimizer, parameters, gradients) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("adamw", {"exp_avg", "exp_avg_sq"}),
        ("sgd", {"momentum_buffer"}),
        ("lion", {"exp_avg"}),
        ("lamb", {"exp_avg", "exp_avg_sq"}),
        ("adan", {"exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"}),
        ("nadamw", {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_moments_and_a_count_are_all_that_an_optimizer_needs_to_go_on(name, moments):
    """Another optimizer that is given them makes the same updates bit for bit."""
    draw = torch.Generator().manual_seed(1)
    starts = [torch.randn(5, 4, generator=draw), torch.randn(7, generator=draw)]
    gradients = [[torch.randn(s.shape, generator=draw) for s in starts] for _ in range(6)]
    kind = optimizer_kind(_optim(name=name), fused=False, sharded=False)
    assert set(kind.moments) == moments

    def build(parameters):
        return kind.build([{"params": parameters, "lr": 0.01, "weight_decay": 0.1}])

    straight = [start.clone().requires_grad_() for start in starts]
    first = build(straight)
    _train(first, straight, gradients[:3])
    halfway = [parameter.detach().clone().requires_grad_() for parameter in straight]
    second = build(halfway)
    for before, parameter in zip(straight, halfway, strict=True):
        kept = {key: first.state[before][key].clone() for key in kind.moments}
        second.state[parameter] = kind.state(parameter, kept, 3)
    kind.resume(second, 3)
    _train(first, straight, gradients[3:])
    _train(second, halfway, gradients[3:])
    for one, other in zip(straight, halfway, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, starts[0 if one.ndim == 2 else 1])


WITH_OPTIONS = [
    ("adamw", {"amsgrad": True}),
    ("adamwlegacy", {"amsgrad": True}),
    ("adabelief", {"amsgrad": True}),
    ("rmsprop", {"centered": True, "momentum": 0.0}),
    ("rmsproptf", {"centered": True, "momentum": 0.0}),
    ("nesterovw", {"momentum": 0.9}),
    ("momentum", {"momentum": 0.0}),
    ("lars", {"momentum": 0.0}),
    ("madgrad", {"momentum": 0.0}),
]


def _form(count) -> str | None:
    return {int: "number", type(None): None}.get(type(count), "tensor")


def _run(kind, starts, gradients, decay):
    """The parameters after the updates, the optimizer, and whether it had state before them."""
    parameters = [start.clone().requires_grad_() for start in starts]
    optimizer = kind.build([{"params": parameters, "lr": 0.1, "weight_decay": decay}])
    early = bool(optimizer.state)
    _train(optimizer, parameters, gradients)
    return [parameter.detach() for parameter in parameters], optimizer, early


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in sorted(KNOWN)), *WITH_OPTIONS]
)
def test_the_table_says_what_an_optimizer_keeps_and_whether_it_can_be_cut(name, options):
    """Its state after three updates, and the same numbers as two matrices and as one flat piece."""
    kind = optimizer_kind(_optim(name=name, options=options), fused=False, sharded=False)
    draw = torch.Generator().manual_seed(0)
    # Large enough that optimizers which factor matrices do so.
    shapes = ((136, 132), (130, 134))
    # Shorter and longer than an update, so that a ratio of both is seen where it is clipped.
    starts = [
        torch.randn(shape, generator=draw) * scale
        for shape, scale in zip(shapes, (0.1, 10), strict=True)
    ]
    gradients = [[torch.randn(s.shape, generator=draw) for s in starts] for _ in range(3)]
    # Some look at the angle between weights and gradient: the first time it is right.
    for start, first in zip(starts, gradients[0], strict=True):
        first -= (first * start).sum(1, keepdim=True) / start.pow(2).sum(1, keepdim=True) * start

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    same = True
    # A cautious mask is hidden by decay, a ratio of lengths is 1 without it.
    for decay in (0.0, 0.1):
        apart, optimizer, early = _run(kind, starts, gradients, decay)
        pieces = [[flat(step)] for step in gradients]
        (together,), _, _ = _run(kind, [flat(starts)], pieces, decay)
        same = same and torch.allclose(flat(apart), together, rtol=1e-5, atol=1e-6)
    group = optimizer.param_groups[0]
    for parameter in group["params"]:
        found = {k: v for k, v in optimizer.state[parameter].items() if v is not None}
        assert _form(found.pop("step", None)) == kind.kept.counts
        assert set(found) == set(kind.moments)
        assert all(value.shape == parameter.shape for value in found.values())
    assert len(optimizer.state) == len(starts)
    assert _form(group.get("step")) == kind.kept.group_counts
    if kind.kept.unsharded == WHOLE:
        assert not same
    elif kind.kept.unsharded is None:
        assert same
        assert not early
        assert kind.kept.group_counts is None
    else:
        assert early or kind.kept.group_counts


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adabelief"])
def test_optimizers_that_treat_each_number_alone_may_be_sharded(name):
    assert optimizer_kind(_optim(name=name), fused=False, sharded=True).kept.unsharded is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lamb", "each tensor as a whole"),
        ("mars", "each tensor as a whole"),
        ("adamp", "each tensor as a whole"),
        ("cadamw", "each tensor as a whole"),
        ("adan", "counts updates for all"),
        ("adagrad", "before parameters are cut"),
    ],
)
def test_other_optimizers_are_refused_under_zero_and_serve_without(name, why):
    assert why in str(optimizer_kind(_optim(name=name), fused=False, sharded=False).kept.unsharded)
    with pytest.raises(ConfigError, match=why):
        optimizer_kind(_optim(name=name), fused=False, sharded=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "lionn"}, "did you mean .*lion"),
        ({"name": "sgd", "options": {"momentun": 0.9}}, "momentun"),
        ({"name": "adafactor"}, "not an optimizer whose state a checkpoint can hold"),
        ({"name": "adahessian"}, "known are adabelief, .*, sgdw"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(settings, said):
    with pytest.raises(ConfigError, match=said):
        optimizer_kind(_optim(**settings), fused=False, sharded=False)
