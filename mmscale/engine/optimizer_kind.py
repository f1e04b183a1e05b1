"""The optimizer by name: torch's AdamW, or any of timm's; what it keeps is seen, never guessed."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor

from mmscale.config.training import OptimConfig
from mmscale.errors import ConfigError

# Large enough that optimizers which factor matrices do so.
_SHAPES = ((136, 132), (130, 134))
_UPDATES = 3


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that checkpoints can hold.

    Attributes:
        config: Its settings.
        fused: AdamW runs as one kernel.
        moments: Tensors of a parameter's shape that it keeps for each.
        counts: What it counts a parameter's updates in: a tensor or a number; None: in nothing.
        group_counts: What it counts updates in once for a whole group, likewise.
        unsharded: Why flat pieces of several tensors cannot stand for them; None where they can.
    """

    config: OptimConfig
    fused: bool
    moments: tuple[str, ...] = ()
    counts: Tensor | int | None = None
    group_counts: Tensor | int | None = None
    unsharded: str | None = None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over groups that say their `lr` and `weight_decay`.

        Raises:
            ConfigError: It does not take `optim.options`.
        """
        return _build(self.config, self.fused, groups)

    def state(self, parameter: Tensor, moments: dict[str, Tensor], updates: int) -> dict[str, Any]:
        """A parameter's state after so many updates, with these moments."""
        if self.counts is None:
            return dict(moments)
        # One kernel for all wants its counts beside the weights.
        place = parameter.device if self.fused else None
        return {"step": _counted(self.counts, updates, place), **moments}

    def resume(self, optimizer: torch.optim.Optimizer, updates: int) -> None:
        """Set what is counted in the groups."""
        for group in optimizer.param_groups if self.group_counts is not None else ():
            group["step"] = _counted(self.group_counts, updates)


def _counted(like: Tensor | int | None, updates: int, place: Any = None) -> Tensor | int:
    if isinstance(like, Tensor):
        return torch.full_like(like, updates, device=place)
    return updates


def optimizer_kind(config: OptimConfig, fused: bool, sharded: bool) -> OptimizerKind:
    """Look at what an optimizer does with two matrices.

    Args:
        config: `optim`.
        fused: AdamW may run as one kernel.
        sharded: ZeRO is going to cut its parameters into flat pieces.

    Raises:
        ConfigError: The name is unknown, the options are wrong, or the optimizer cannot be
            checkpointed, or not sharded.
    """
    key, name = f"optim.name={config.name}", config.name.lower()
    if name not in list_optimizers():
        close = difflib.get_close_matches(name, list_optimizers(), 1)
        hint = f"did you mean {close[0]}?" if close else "adamw, sgd, lion and lamb are"
        raise ConfigError(f"{key} is no optimizer that timm knows; {hint}")
    if get_optimizer_info(name).second_order:
        raise ConfigError(f"{key} needs second derivatives, which no window computes; take another")
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw) * 10**i for i, shape in enumerate(_SHAPES)]
    gradients = [[torch.randn(s.shape, generator=draw) for s in starts] for _ in range(_UPDATES)]
    # Some look at the angle between weights and gradient: the first time it is right.
    for start, first in zip(starts, gradients[0], strict=True):
        share = (first * start).sum(1, keepdim=True) / start.pow(2).sum(1, keepdim=True)
        first -= share * start
    whole = _run(config, starts, gradients)
    flat = _run(config, [_flat(starts)], [[_flat(step)] for step in gradients])
    kind = _seen(config, fused, whole, _why_unsharded(whole, flat, _flat(starts)))
    if sharded and kind.unsharded:
        raise ConfigError(
            f"{key} {kind.unsharded}, so ZeRO, which cuts parameters into flat pieces, would train "
            "something else; set engine.kind=accelerate, or optim.name to adamw, sgd or lion"
        )
    return kind


@dataclass(frozen=True)
class _Run:
    """An optimizer after a few updates, and its groups before them."""

    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    before: dict[str, Any]
    early_state: bool


def _run(config: OptimConfig, starts: Sequence[Tensor], gradients: list[list[Tensor]]) -> _Run:
    parameters = [start.clone().requires_grad_() for start in starts]
    group = {"params": parameters, "lr": 0.1, "weight_decay": 0.1}
    optimizer = _build(config, False, [group])
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    early = bool(optimizer.state)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return _Run(optimizer, parameters, before, early)


def _build(config: OptimConfig, fused: bool, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    name = config.name.lower()
    if name == "adamw":
        # timm's default betas aside, its adamw is this one; torch's takes `fused`.
        make: Any = partial(torch.optim.AdamW, betas=config.betas, eps=config.eps, fused=fused)
    else:
        betas: dict[str, Any] = (
            {"betas": config.betas} if get_optimizer_info(name).num_betas == 2 else {}
        )
        make = partial(create_optimizer_v2, opt=name, lr=config.lr, eps=config.eps, **betas)
    try:
        optimizer: torch.optim.Optimizer = make(groups, **config.options)
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise ConfigError(
            f"optim.name={config.name} with optim.options={config.options} cannot be built "
            f"({error}); mend the options or take another optimizer"
        ) from error
    return optimizer


def _seen(config: OptimConfig, fused: bool, run: _Run, unsharded: str | None) -> OptimizerKind:
    """What an optimizer keeps.

    Raises:
        ConfigError: Something that is neither a moment nor a count of updates.
    """
    moments: dict[str, None] = {}
    counts: Tensor | int | None = None
    state, group = run.optimizer.state, run.optimizer.param_groups[0]
    odd = {str(key) for key in state if not any(key is own for own in run.parameters)}
    for parameter in run.parameters:
        for name, value in state[parameter].items():
            if name == "step":
                counts = value
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = None
            elif value is not None:
                odd.add(str(name))
    changed = {key for key in group.keys() - {"params"} if run.before.get(key) != group[key]}
    odd |= changed - {"step"}
    if odd:
        raise ConfigError(
            f"optim.name={config.name} keeps {', '.join(sorted(odd))}, for which checkpoints have "
            "no place: they hold tensors of a parameter's shape and a count of updates; take "
            "another optimizer"
        )
    return OptimizerKind(config, fused, tuple(moments), counts, group.get("step"), unsharded)


def _why_unsharded(whole: _Run, flat: _Run, start: Tensor) -> str | None:
    apart, together = _flat(whole.parameters), flat.parameters[0].detach()
    if (apart - together).abs().max() > 1e-3 * (apart - start).abs().max():
        return "treats each tensor as a whole"
    if whole.early_state:
        return "makes its state before parameters are cut"
    if "step" in whole.optimizer.param_groups[0]:
        return "counts updates for all parameters together"
    return None


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
