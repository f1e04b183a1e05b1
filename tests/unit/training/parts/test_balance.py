"""The balancer against a closed form: towers whose relative updates follow from their rates."""

import math

import pytest
import torch
from torch import nn

from mmscale.checkpoint.state import RunState
from mmscale.config.training import BalanceConfig
from mmscale.engine.protocol import Engine
from mmscale.parallel.peers import Alone
from mmscale.training.part import Step
from mmscale.training.parts.balance import ModalityBalancer
from tests.ranks.tiny import joint_batch
from tests.unit.training.rows import loss_input

BATCH, ROWS = joint_batch(), loss_input(2, 3)


class Towers(Engine):
    """An engine whose vision tower moves `speed` times as far as its text tower at equal rates."""

    def __init__(self, speed: float):
        self.module = nn.ModuleDict(
            {"vision": nn.Linear(4, 4, False), "text": nn.Linear(4, 4, False)}
        )
        for parameter in self.module.parameters():
            nn.init.constant_(parameter, 1.0)
        self._speed = {"vision": speed, "text": 1.0}
        self.groups = [
            {"component": name, "balance": 1.0, "names": [f"{name}.weight"], "lr": 1e-3}
            | {"weight_decay": 0.0}
            for name in ("vision", "text")
        ]

    def masters(self):
        return iter((name, p.detach()) for name, p in self.module.named_parameters())

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            weight = self.module.get_parameter(group["names"][0])
            weight.mul_(1 + 1e-3 * self._speed[group["component"]] * group["balance"])

    @property
    def factors(self):
        return [group["balance"] for group in self.groups]


def _run(towers, steps, state=None, band=(0.5, 2.0), every=1):
    balancer = ModalityBalancer(BalanceConfig(band=band, every=every), towers, Alone())
    balancer.load(state or {})
    for step in range(steps):
        balancer.before(Step(RunState(step)), BATCH)
        towers.step()
        balancer.follow(ROWS, BATCH)
    return balancer.state()


def test_a_tower_that_moves_too_far_is_slowed_to_the_edge_of_the_band():
    towers = Towers(speed=10.0)
    state = _run(towers, 40)
    vision, text = towers.factors
    assert text == 1
    assert vision == pytest.approx(0.2, rel=1e-3), "10 x 0.2 is the band's 2"
    assert state["update_vision"] / state["update_text"] == pytest.approx(2.0, rel=1e-3)


def test_the_other_tower_is_slowed_at_the_other_edge():
    towers = Towers(speed=0.1)
    _run(towers, 40)
    assert towers.factors == pytest.approx([1.0, 0.2], rel=1e-3)


def test_inside_the_band_nothing_changes():
    towers = Towers(speed=1.9)
    state = _run(towers, 20)
    assert towers.factors == [1.0, 1.0]
    assert state["balance"] == 0


def test_a_tower_that_was_slowed_comes_back():
    towers = Towers(speed=10.0)
    state = _run(towers, 40)
    towers._speed["vision"] = 1.0
    _run(towers, 80, state)
    assert 0.49 < towers.factors[0] <= 1, "a fifth of the rate would lie below the band's 0.5"


def test_balance_resumed_from_its_state_gives_the_same_factors():
    straight, cut = Towers(5.0), Towers(5.0)
    wanted = _run(straight, 12)
    state = _run(cut, 6)
    assert set(state) == {"balance", "balance_mean", "update_vision", "update_text"}
    assert _run(cut, 6, state) == wanted
    assert cut.factors == straight.factors


def test_balance_measures_every_nth_update_and_no_skipped_one():
    towers = Towers(9.0)
    balancer = ModalityBalancer(BalanceConfig(band=(0.5, 2), every=4), towers, Alone())
    seen = []
    for step in range(9):
        balancer.before(Step(RunState(step)), BATCH)
        towers.step()
        # Step 4 is skipped: nothing follows.
        if step != 4:
            balancer.follow(ROWS, BATCH)
        seen.append(balancer.state().get("update_vision", 0.0))
    assert [index for index in range(1, 9) if seen[index] != seen[index - 1]] == [8]
    assert seen[0] > 0


def test_without_a_band_it_only_watches_the_rates_it_was_given():
    towers = Towers(speed=10.0)
    assert _run(towers, 5, band=None) == {}
    assert towers.factors == [1.0, 1.0]


def test_no_factor_falls_below_a_hundredth():
    towers = Towers(speed=1.0)
    state = {"balance": -math.log(100), "balance_mean": math.log(50)}
    _run(towers, 1, state)
    assert towers.factors[0] == pytest.approx(0.01)
