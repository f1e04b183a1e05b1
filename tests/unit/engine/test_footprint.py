"""FLOPs of an update, against torch's count of the same rows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmscale.engine.footprint import count_flops
from mmscale.model.build import build_model
from tests.ranks.tiny import tiny_config


def counted(model, rows, tokens):
    with FlopCounterMode(display=False) as counter:
        ids = torch.ones(rows, tokens, dtype=torch.int64)
        image = model("image", torch.zeros(rows, 3, 16, 16))
        text = model("text", ids, ids.bool())
        (image.sum() + text.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tokens", [5, 12, 16])
def test_they_are_those_of_the_batch(tokens):
    model, spec = build_model(tiny_config().model, None, 0)
    found = count_flops(model.train(), spec).update(6, tokens)
    assert found == pytest.approx(counted(model, 6, tokens), rel=1e-3)


def test_a_frozen_tower_goes_forward_only_and_nothing_is_left_behind():
    trained, spec = build_model(tiny_config().model, None, 0)
    frozen, _ = build_model(tiny_config(model__vision__frozen=True).model, None, 0)
    ratio = count_flops(trained.train(), spec).image / count_flops(frozen.train(), spec).image
    assert 2.5 < ratio <= 3.1
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_an_adapters_tower_spares_the_gradients_of_what_is_kept():
    adapter = {"kind": "lora", "rank": 2}
    settings = {"model__vision__adapter": adapter, "model__text__adapter": adapter}
    model, spec = build_model(tiny_config(**settings).model, None, 0)
    found = count_flops(model.train(), spec).update(6, 16)
    assert found == pytest.approx(counted(model, 6, 16), rel=1e-3)
