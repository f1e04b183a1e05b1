"""The pull to the start against its closed form, in float64."""

import os

import pytest
import torch

from mmscale.contracts import World
from mmscale.model.build import build_model
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import ROWS, tiny_config, train

WEIGHT = 0.03
FROZEN = {"model__text__frozen": True}


def _one_update(*objectives):
    world = int(os.environ["WORLD_SIZE"])
    join_ranks(World(), "gloo", 60, alone_too=True)
    rows, rank = ROWS // world, int(os.environ["RANK"])
    return [
        train(rank, world, "accelerate", rows, 1, FROZEN | {"loss__terms": terms}, torch.float64)
        for terms in objectives
    ]


def test_distance_and_gradient_are_those_of_the_closed_form_over_trained_weights_alone():
    plain = [{"kind": "infonce"}]
    near = [*plain, {"kind": "l2_start", "weight": WEIGHT}]
    ((without, pulled),) = run_on_ranks(1, _one_update, plain, near)
    own, start = (
        {n: w.double() for n, w in build_model(tiny_config().model, None, s)[0].named_parameters()}
        for s in (0, 6)
    )
    distance = 0.0
    assert {name.split(".")[0] for name in pulled["gradients"]} == {"vision", "head", "scale"}
    for name, gradient in pulled["gradients"].items():
        apart = own[name].detach() - start[name].detach()
        distance += float(apart.square().sum())
        wanted = without["gradients"][name] + 2 * WEIGHT * apart
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
    record, before = pulled["records"][0], without["records"][0]
    assert record.terms["l2_start"] == pytest.approx(distance, rel=1e-12)
    assert record.loss == pytest.approx(before.loss + WEIGHT * distance, rel=1e-12)
    norms = torch.stack([gradient.norm() for gradient in pulled["gradients"].values()])
    assert record.grad_norm["total"] == pytest.approx(float(norms.norm()), rel=1e-12)
