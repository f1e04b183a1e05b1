"""Groups of parameters by component, depth, and decay or none; the optimizer and its rate."""

import math
from typing import Any

from torch import Tensor, nn

from mmscale.config.training import OptimConfig
from mmscale.contracts import KINDS, PARTS
from mmscale.errors import ConfigError
from mmscale.model.freezing import layer_scales
from mmscale.model.two_tower import component_of, no_decay


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups with `name`, `component`, `base_lr`, `balance`, `weight_decay`, `names` and a size.

    Every trained parameter is in exactly one; `parameters` counts its numbers. A group is one
    component's, at one depth where `layer_decay` tells depths apart.

    Raises:
        ConfigError: Nothing is trained.
    """
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    depths = _depths(model, config)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        component, depth = component_of(name), depths.get(name, 1.0)
        decays = not no_decay(name, parameter)
        rate = config.lr * getattr(config.lr_scale, component) * depth
        decay = config.weight_decay * getattr(config.weight_decay_scale, component)
        group = groups.setdefault(
            (component, depth, decays),
            {
                "name": _group_name(component, depth, decays),
                "component": component,
                "params": [],
                "names": [],
                "base_lr": rate,
                "balance": 1.0,
                "lr": rate,
                "weight_decay": decay if decays else 0.0,
                "parameters": 0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        group["parameters"] += parameter.numel()
    if not groups:
        raise ConfigError("nothing is trained: every part of the model is frozen; unfreeze one")
    return list(groups.values())


def _depths(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Factor by depth for the parameters of towers whose layers have rates of their own."""
    factors: dict[str, float] = {}
    for component in ("vision", "text"):
        decay = getattr(config.layer_decay, component)
        if decay < 1:
            tower: Any = model.get_submodule(component)
            scales = layer_scales(tower, decay)
            factors |= {f"{component}.{name}": factor for name, factor in scales.items()}
    return factors


def _group_name(component: str, depth: float, decays: bool) -> str:
    layer = "" if depth == 1 else f" x {depth:.3g}"
    return f"{component}{layer}.{'decay' if decays else 'no_decay'}"


def set_rates(groups: list[dict[str, Any]], factor: float) -> None:
    """Every group's rate at `factor` times its base, and times its `balance`."""
    for group in groups:
        group["lr"] = group["base_lr"] * factor * group["balance"]


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by `PARTS`, in their order; taken before an engine shards the model."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = KINDS[0] if parameter.ndim > 1 else KINDS[1]
            parts[f"{component_of(name)}_{kind}"].append(parameter)
    return parts


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint; the others follow from the architecture."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def rate_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor of the base rate for update `step` (from 0) of `total`.

    Args:
        step: Updates already made.
        total: Updates of the whole run, or of its stage.
        warmup: Updates over which the rate rises linearly; cut to `total`.
        kind: `cosine`, `linear`, `constant` or `plateau` after the warm-up; a plateau's falls are a
            factor of their own.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return max(0.0, 1 - progress) if kind == "linear" else 1.0
