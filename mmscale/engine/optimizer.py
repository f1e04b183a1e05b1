"""AdamW over groups by component, decay or none."""

from typing import Any

import torch
from torch import Tensor, nn

from mmscale.config.schema import OptimConfig
from mmscale.contracts import KINDS, PARTS
from mmscale.errors import ConfigError
from mmscale.model.two_tower import component_of, no_decay


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups with `name`, `base_lr`, `weight_decay` and the parameters' `names`.

    Every trained parameter is in exactly one.

    Raises:
        ConfigError: Nothing is trained.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        component = component_of(name)
        decays = not no_decay(name, parameter)
        key = f"{component}.{'decay' if decays else 'no_decay'}"
        rate = config.lr * getattr(config.lr_scale, component)
        decay = config.weight_decay * getattr(config.weight_decay_scale, component)
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "names": [],
                "base_lr": rate,
                "lr": rate,
                "weight_decay": decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("nothing is trained: every part of the model is frozen; unfreeze one")
    return list(groups.values())


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, fused: bool
) -> torch.optim.AdamW:
    """AdamW over the groups."""
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)


def set_rates(groups: list[dict[str, Any]], factor: float) -> None:
    """Every group's rate at `factor` times its base."""
    for group in groups:
        group["lr"] = group["base_lr"] * factor


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
