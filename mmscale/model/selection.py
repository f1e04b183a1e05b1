"""What of a built model a stage trains: components, blocks, or names by pattern."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmscale.config.rules import blocks_of, expanded_stages
from mmscale.config.schema import Config
from mmscale.contracts import COMPONENTS
from mmscale.errors import ConfigError
from mmscale.model.two_tower import TwoTower, component_of

TOWERS = ("vision", "text")


def check_patterns(model: TwoTower, config: Config) -> None:
    """Refuse a run in which a pattern of some stage matches nothing.

    Raises:
        ConfigError: Names each such pattern.
    """
    if not config.stages:
        return
    names = _trainable(model, config)
    faults = [
        f"stages: {pattern!r} of stage {stage.name!r} matches no parameter that may be trained; "
        f"give components ({', '.join(_components(names))}), blocks such as vision[-2:], or names "
        f"such as {_example(names)}, and unfreeze model.vision or model.text if it is frozen"
        for stage in expanded_stages(config)
        for pattern in stage.train
        if not matched(model, names, pattern)
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def select(model: TwoTower, config: Config, number: int) -> list[str]:
    """Leave only what a stage trains trainable; a line about each of its patterns.

    A tower of which nothing is trained becomes a frozen one; modules without trained parameters
    rest in evaluation mode.
    """
    stages = expanded_stages(config)
    if not stages:
        return []
    stage, names = stages[number], _trainable(model, config)
    chosen: set[str] = set()
    lines = [f"stage {number + 1} of {len(stages)}, {stage.name!r}, trains"]
    for pattern in stage.train:
        found = matched(model, names, pattern)
        size = sum(model.get_parameter(name).numel() for name in found)
        lines.append(f"  {pattern}: {len(found):,} tensors, {size:,} parameters")
        chosen |= set(found)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    idle = {name for name in TOWERS if not any(n.startswith(f"{name}.") for n in chosen)}
    model.freeze(idle)
    for name in set(TOWERS) - idle:
        tower = _tower(model, name)
        tower.rest([module for module in tower.modules() if _rests(module)])
    return lines


def matched(model: TwoTower, names: Sequence[str], pattern: str) -> list[str]:
    """Which of these parameters a pattern means."""
    if blocks := blocks_of(pattern):
        tower, part = blocks
        # What comes before the blocks is none.
        groups = _tower(model, tower).block_parameters()[1:][part]
        wanted = {f"{tower}.trunk.{name}" for group in groups for name in group}
        return [name for name in names if name in wanted]
    if pattern in COMPONENTS:
        return [name for name in names if component_of(name) == pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def _trainable(model: TwoTower, config: Config) -> list[str]:
    """Parameters that some stage may train, whatever the present one does."""
    shut = {name for name in TOWERS if getattr(config.model, name).frozen is True}
    inert = {f"{name}.{inner}" for name in TOWERS for inner in _tower(model, name).inert}
    return [
        name
        for name, _ in model.named_parameters()
        if component_of(name) not in shut and name not in inert
    ]


def _tower(model: TwoTower, name: str) -> Any:
    return model.get_submodule(name)


def _components(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(component_of(name) for name in names))


def _example(names: Sequence[str]) -> str:
    return f"{names[0].rsplit('.', 1)[0]}.*" if names else "head.*"


def _rests(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
