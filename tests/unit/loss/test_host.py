"""No term waits for the host on an update that is not logged.

On the meta device tensors have shapes and no numbers: whatever asks for a number, or for a shape
that depends on one, is an error there. On an accelerator it would be a wait for all that was
launched before.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from mmscale.config.load import validate
from mmscale.loss.objective import Objective
from mmscale.loss.term import Given, compute
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import IDS, TERMS, WITH_BANK, leaves, loss, made_up, term

CASES = [(name, False) for name in TERMS] + [(name, True) for name in WITH_BANK]


def without_numbers(value: Any) -> Any:
    """The same records, of tensors that have shapes only."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta").requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        return tuple(map(without_numbers, value))
    if isinstance(value, dict):
        return {name: without_numbers(part) for name, part in value.items()}
    if is_dataclass(value):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return replace(value, **{name: without_numbers(part) for name, part in parts.items()})
    return value


def rows(with_bank: bool, dtype: torch.dtype = torch.float32, **changes: Any):
    leaf = {name: tensor.requires_grad_() for name, tensor in leaves(IDS, dtype=dtype).items()}
    return replace(without_numbers(made_up(leaf, IDS, 1, with_bank)), **changes)


@pytest.mark.parametrize(("name", "with_bank"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_term_asks_the_host_between_logged_updates(name, with_bank, dtype):
    loss(name, rows(with_bank, dtype, is_logged=False), Alone()).backward()


@pytest.mark.parametrize("mining", ["none", "hard", "semi_hard"])
def test_the_objective_does_not_either(mining):
    kinds = [{"kind": "infonce", "weight": {"from": 1, "to": 2, "over": "4 steps"}}]
    kinds += [{"kind": kind} for kind in ("siglip", "hinge", "vicreg", "classification")]
    config = validate(
        {
            "data": {"train": "unused"},
            "loss": {"terms": kinds},
            "negatives": {"mining": {"kind": mining}},
            "model": {"fusion": {"classes": 3}, "logit_scale": {"bias": -10.0}},
        }
    )
    Objective(config, Alone())(rows(with_bank=True, is_logged=False)).total.backward()


def test_what_is_asked_of_the_host_is_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        compute(term("classification"), Given(rows(False), Alone(), lambda ramp: 0.0))


def test_a_label_that_no_class_has_is_never_trained_on_between_logged_updates():
    """Where it cannot be refused without a wait, the loss is NaN, and so the update is skipped."""
    labels = torch.full_like(IDS, 3)
    with_labels = replace(made_up(leaves(IDS), IDS), labels=labels, is_logged=False)

    class Elsewhere(torch.Tensor):
        """Numbers of the CPU that say they lie on an accelerator."""

        device = torch.device("meta")

    far = replace(with_labels, labels=labels.as_subclass(Elsewhere))
    assert loss("classification", far, Alone()).isnan()
